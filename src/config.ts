import { existsSync } from 'node:fs';
import { z } from 'zod';

const MAX_TIMER_MS = 2_147_483_647;
/** Bytes of JSON: what is said together is read, written and sent in one piece. */
const MAX_OUTPUT_BYTES = 67_108_864;
const PROVIDER_NAME = /^[a-z0-9][a-z0-9_-]*$/;

const integer = (min: number, max: number, fallback: number) =>
  z
    .string()
    .regex(/^\d+$/, `must be a whole number from ${min} to ${max}`)
    .transform(Number)
    .refine((value) => value >= min && value <= max, `must be a whole number from ${min} to ${max}`)
    .default(fallback);

const url = (protocols: string[]) =>
  z
    .string()
    .refine(
      (value) => URL.canParse(value) && protocols.includes(new URL(value).protocol),
      `must be a URL that begins with ${protocols.map((protocol) => `${protocol}//`).join(' or ')}`,
    );

const modelProvider = z
  .strictObject({
    type: z.enum(['openai-compatible', 'openai', 'anthropic']),
    base_url: url(['http:', 'https:']).optional(),
    api_key_env: z
      .string()
      .regex(/^[A-Za-z_][A-Za-z0-9_]*$/, 'must be the name of an environment variable, not a key')
      .optional(),
    timeout_ms: z.int().min(1).max(MAX_TIMER_MS).default(60_000),
  })
  .refine((provider) => provider.type !== 'openai-compatible' || provider.base_url !== undefined, {
    path: ['base_url'],
    message: 'is needed for an openai-compatible provider',
  });

/** Where a model is reached. `timeout_ms` is the longest silence of the upstream, before the first token and between two. */
export type ModelProviderConfig = z.infer<typeof modelProvider>;

const modelProviders = z
  .string()
  .default('{}')
  .transform((text, context): unknown => {
    try {
      return JSON.parse(text);
    } catch {
      context.addIssue({
        code: 'custom',
        message:
          'must be a JSON object, e.g. {"local": {"type": "openai-compatible", "base_url": "http://127.0.0.1:11434/v1"}}',
      });
      return z.NEVER;
    }
  })
  .pipe(
    z.record(z.string(), modelProvider).superRefine((providers, context) => {
      for (const name of Object.keys(providers)) {
        if (PROVIDER_NAME.test(name) && name !== 'offline') continue;
        const message =
          'must be named with lower-case letters, digits, - or _, and not "offline", which is built in';
        context.addIssue({ code: 'custom', path: [name], message });
      }
    }),
  );

const origins = z
  .string()
  .default('*')
  .transform((text) =>
    text
      .split(',')
      .map((origin) => origin.trim())
      .filter((origin) => origin !== ''),
  )
  .refine(
    (list) =>
      list.length > 0 &&
      list.every((origin) => origin === '*' || (URL.canParse(origin) && new URL(origin).origin === origin)),
    'must be * or origins separated by commas, e.g. https://app.example.com,http://localhost:3000',
  );

const schema = z.object({
  HOST: z.string().min(1).default('127.0.0.1'),
  PORT: integer(0, 65_535, 8000),
  DATABASE_URL: url(['postgres:', 'postgresql:']).optional(),
  DATABASE_POOL_SIZE: integer(2, 1000, 10),
  DATABASE_TIMEOUT_MS: integer(100, 600_000, 4000),
  DATABASE_SLOW_POOL_SIZE: integer(1, 100, 2),
  DATABASE_SLOW_TIMEOUT_MS: integer(1000, 3_600_000, 30_000),
  DATABASE_SLOW_QUEUE: integer(1, 10_000, 20),
  NOTIFICATION_QUEUE_WATCH_MS: integer(100, 60_000, 5000),
  NOTIFICATION_QUEUE_WARN_PERCENT: integer(1, 100, 50),
  DATA_DIR: z.string().min(1).default('./data'),
  REDIS_URL: url(['redis:', 'rediss:']).optional(),
  ROLE: z.enum(['all', 'api', 'worker']).default('all'),
  WORKER_CONCURRENCY: integer(1, 10_000, 200),
  MODEL_PROVIDERS: modelProviders,
  STREAM_FLUSH_INTERVAL_MS: integer(0, 10_000, 10),
  DURABLE_CHUNKS: z.enum(['true', 'false'], 'must be true or false').default('false'),
  HEARTBEAT_INTERVAL_MS: integer(100, 3_600_000, 15_000),
  JOB_LOCK_MS: integer(1000, 600_000, 5000),
  MAX_LOST_ATTEMPTS: integer(1, 1000, 5),
  MAX_QUEUED: integer(1, 10_000_000, 10_000),
  SHUTDOWN_GRACE_MS: integer(0, 600_000, 10_000),
  EXECUTION_TIMEOUT_S: integer(1, 86_400, 300),
  EVALUATION_THREADS: integer(1, 64, 2),
  EVALUATION_BUDGET_MS: integer(1, 3_600_000, 2000),
  MAX_AGENT_OUTPUT: integer(1000, MAX_OUTPUT_BYTES, 50_331_648),
  MAX_EXECUTION_OUTPUT: integer(1000, MAX_OUTPUT_BYTES, MAX_OUTPUT_BYTES),
  MAX_PROCESS_OUTPUT_PERCENT: integer(0, 100, 12),
  EVENT_RETENTION_DAYS: integer(1, 36_500, 30),
  CORS_ORIGINS: origins,
  MAX_CLIENT_CONNECTIONS: integer(1, 1_000_000, 10_000),
  REQUEST_TIMEOUT_MS: integer(100, MAX_TIMER_MS, 60_000),
  ANSWER_TIMEOUT_MS: integer(100, MAX_TIMER_MS, 60_000),
  KEEP_ALIVE_TIMEOUT_MS: integer(0, MAX_TIMER_MS, 5000),
  MAX_BODY_BYTES: integer(1024, 1_073_741_824, 1_048_576),
  MAX_JSON_DEPTH: integer(4, 256, 32),
  MAX_JSON_VALUES: integer(1000, 10_000_000, 100_000),
  WS_MAX_SUBSCRIPTIONS: integer(1, 100_000, 1000),
  MAX_AGENTS: integer(1, 10_000, 100),
  MAX_CONNECTIONS: integer(0, 100_000, 1000),
  SEED_EXAMPLE: z.enum(['true', 'false'], 'must be true or false').optional(),
  LOG_LEVEL: z.enum(['fatal', 'error', 'warn', 'info', 'debug', 'trace', 'silent']).default('info'),
});

/** The server's configuration, one property for each variable of `.env.example`; times in ms unless the name says otherwise. */
export type Config = Readonly<z.infer<typeof schema>> & {
  /** Reads an API key when an agent needs it, so that a missing one is said then and not at the start. */
  readonly secret: (variable: string) => string | undefined;
};

/** The configuration of a server whose database is known, be it the embedded one. */
export type ServerConfig = Config & { readonly DATABASE_URL: string };

/** Injection token of the {@link ServerConfig}. */
export const CONFIG = Symbol('Config');

/** Names every bad variable and what it may be. */
export class ConfigError extends Error {
  override name = 'ConfigError';
}

/**
 * Reads `.env` (variables that are already set win) and the environment.
 * A variable set to nothing counts as not set. Throws {@link ConfigError}.
 */
export function loadConfig(env: NodeJS.ProcessEnv = readEnvironment()): Config {
  const given = Object.fromEntries(Object.entries(env).filter(([, value]) => value !== ''));
  const parsed = schema.safeParse(given);
  if (!parsed.success) {
    const lines = parsed.error.issues.map((issue) => `  ${describePath(issue.path)}: ${issue.message}`);
    throw new ConfigError(
      `The configuration is not valid:\n${lines.join('\n')}\nSee .env.example for every variable.`,
    );
  }
  if (parsed.data.ROLE !== 'all' && !parsed.data.DATABASE_URL) {
    throw new ConfigError(
      `The configuration is not valid:\n  DATABASE_URL: is needed with ROLE=${parsed.data.ROLE}, because several processes share one database`,
    );
  }
  return Object.freeze({ ...parsed.data, secret: (variable: string) => env[variable] || undefined });
}

function describePath(path: readonly PropertyKey[]): string {
  return path.map((part, index) => (index === 0 ? String(part) : `["${String(part)}"]`)).join('');
}

function readEnvironment(): NodeJS.ProcessEnv {
  if (existsSync('.env')) process.loadEnvFile('.env');
  return process.env;
}

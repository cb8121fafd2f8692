import { loadConfig } from '../../src/config.js';
import { AppError } from '../../src/errors.js';
import { AiSdkModelRegistry } from '../../src/models/ai-sdk.registry.js';
import type { Model, ModelPart, ModelRequest } from '../../src/models/model-registry.js';
import { Upstream, messageStream } from './upstream.js';
import type { UpstreamAnswer } from './upstream.js';

export type ProviderType = 'openai-compatible' | 'openai' | 'anthropic';

/** A `timeout_ms` that no test reaches. */
export const PATIENT_MS = 600_000;

/** Anthropic's stream of the answer "a" with 3 and 5 tokens, and its part up to the end of the text. */
export const WHOLE_MESSAGE = messageStream(['a'], { input_tokens: 3, output_tokens: 5 });
export const CUT_MESSAGE = WHOLE_MESSAGE.slice(0, WHOLE_MESSAGE.indexOf('event: message_delta'));

const registries = new Set<AiSdkModelRegistry>();
const upstreams = new Set<Upstream>();

export const query: ModelRequest = { messages: [{ role: 'user', content: 'hello' }] };

/** A registry of these `MODEL_PROVIDERS`; `env` holds their keys and may be changed later. */
export function createRegistry(providers: object, env: Record<string, string> = {}): AiSdkModelRegistry {
  env['MODEL_PROVIDERS'] = JSON.stringify(providers);
  const registry = new AiSdkModelRegistry(loadConfig(env));
  registries.add(registry);
  return registry;
}

/** The model `m/1` of a provider that answers with what `answer` writes. */
export async function startModel(
  answer: UpstreamAnswer,
  options: {
    type?: ProviderType;
    timeout_ms?: number;
    api_key_env?: string;
    env?: Record<string, string>;
  } = {},
): Promise<{ model: Model; upstream: Upstream; registry: AiSdkModelRegistry }> {
  const {
    env = { OPENAI_API_KEY: 'k', ANTHROPIC_API_KEY: 'k' },
    type = 'openai-compatible',
    timeout_ms = PATIENT_MS,
    api_key_env,
  } = options;
  const upstream = await Upstream.start(answer);
  upstreams.add(upstream);
  const registry = createRegistry({ p: { type, base_url: upstream.url, timeout_ms, api_key_env } }, env);
  return { model: registry.resolve('p/m/1'), upstream, registry };
}

/** Ends what {@link createRegistry} and {@link startModel} began; for `afterEach`. */
export async function stopModels(): Promise<void> {
  await Promise.all([...registries].map((registry) => registry.close()));
  await Promise.all([...upstreams].map((upstream) => upstream.stop()));
  registries.clear();
  upstreams.clear();
}

/** Streams an answer to its end; `parts` also has what came before a failure. */
export async function collect(
  model: Model,
  options: { request?: ModelRequest; signal?: AbortSignal; parts?: ModelPart[] } = {},
): Promise<ModelPart[]> {
  const { request = query, signal = new AbortController().signal, parts = [] } = options;
  for await (const batch of model.stream(request, signal)) parts.push(...batch);
  return parts;
}

export async function generate(model: Model, request = query): Promise<{ text: string }> {
  return model.generate(request, new AbortController().signal);
}

export function textOf(parts: ModelPart[]): string {
  return parts.map((part) => (part.type === 'text' ? part.text : '')).join('');
}

/** What a call failed with; fails itself if that is not an {@link AppError}. */
export async function failureOf(call: Promise<unknown>): Promise<AppError> {
  const error: unknown = await call.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  if (error instanceof AppError) return error;
  throw new Error('The call should have failed with an AppError', { cause: error });
}

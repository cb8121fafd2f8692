import { afterAll, beforeAll } from '@jest/globals';
import type { NestExpressApplication } from '@nestjs/platform-express';
import { startTestApp } from './app.js';
import type { TestApp } from './app.js';
import { newMigratedDatabase } from './database.js';
import type { TestDatabase } from './database.js';
import { Studio, until } from './studio.js';
import { Upstream } from './upstream.js';
import type { UpstreamAnswer } from './upstream.js';

type Variables = Record<string, string>;

/** A model provider in the test's own process. */
export interface TestProvider {
  readonly url: string;
  listen(): Promise<void>;
  stop(): Promise<void>;
}

export interface ModelOptions {
  /** What the provider named `upstream` answers with, or that provider; without it there is none. */
  upstream?: UpstreamAnswer | TestProvider;
  /** Providers by name, each an OpenAI-compatible one at `upstream` but for the fields given here; `upstream` itself, too. */
  providers?: Record<string, object>;
}

export interface StudioOptions<Other extends string> extends ModelOptions {
  /** Variables of the configuration of all its processes. */
  env?: Variables;
  /** More processes on the same database, each with its own variables besides. */
  others?: Record<Other, Variables>;
  /** Fails at the end if a stream, a WebSocket, a subscription or a counted client is left over. */
  leavesNothing?: boolean;
}

/** One process of the server, in the test's own. It can be handed out before it runs, and asked once it does. */
export class RunningStudio {
  private started?: TestApp;
  readonly studio = new Studio(() => this.url);

  /** `http://127.0.0.1:<port>` */
  get url(): string {
    return this.running.url;
  }

  get app(): NestExpressApplication {
    return this.running.app;
  }

  private get running(): TestApp {
    if (!this.started) throw new Error('The server is not there: it starts before the first test.');
    return this.started;
  }

  async start(env: Variables, database: TestDatabase): Promise<void> {
    this.started = await startTestApp(env, database);
  }

  /** Closes it, unless that was done. */
  async close(): Promise<void> {
    const { started } = this;
    this.started = undefined;
    await started?.close();
  }
}

/** A whole system: a database, processes of the server on it, and a model provider. */
export class StudioSystem<Other extends string> extends RunningStudio {
  readonly database = newMigratedDatabase();
  readonly others: Record<Other, RunningStudio>;
  private readonly provider: TestProvider | undefined;
  private readonly more: RunningStudio[] = [];

  constructor(private readonly options: StudioOptions<Other>) {
    super();
    this.provider = providerOf(options);
    const names = Object.keys(options.others ?? {}) as Other[];
    this.others = Object.fromEntries(names.map((name) => [name, new RunningStudio()])) as typeof this.others;
  }

  /** The provider that answers as `upstream` says. */
  get upstream(): Upstream {
    if (this.provider instanceof Upstream) return this.provider;
    throw new Error('This system has no upstream of its own.');
  }

  /** Variables that all its processes have. */
  get env(): Variables {
    return { ...modelVariables(this.options, this.provider), ...this.options.env };
  }

  async startAll(): Promise<void> {
    await this.provider?.listen();
    await this.database.create();
    await this.start(this.env, this.database);
    for (const [name, env] of Object.entries<Variables>(this.options.others ?? {}))
      await this.others[name as Other].start({ ...this.env, ...env }, this.database);
  }

  /** One process more on the same database; it is closed at the end of the file, if not before. */
  async startAnother(env: Variables = {}): Promise<RunningStudio> {
    const another = new RunningStudio();
    this.more.push(another);
    await another.start({ ...this.env, ...env }, this.database);
    return another;
  }

  async closeAll(): Promise<void> {
    const others = [...this.more, ...Object.values<RunningStudio>(this.others)];
    try {
      if (this.options.leavesNothing) await this.expectNothingLeft([this, ...others]);
    } finally {
      for (const process of [...others, this]) await process.close();
      await this.database.drop();
      await this.provider?.stop();
    }
  }

  private async expectNothingLeft(processes: RunningStudio[]): Promise<void> {
    const counted = () => this.database.query('SELECT 1 FROM execution_subscriber WHERE count > 0');
    await until(async () => (await counted()).length === 0);
    for (const { studio } of processes)
      for (const kind of ['open_streams', 'open_websockets', 'websocket_subscriptions'])
        await until(async () => (await studio.metric(`agent_studio_${kind}`)) === 0);
  }
}

/**
 * The real server for all tests of a file (or of a `describe`), on a database of its own, with a model provider whose answers
 * the test writes. It starts before the first of them, and ends with all that belongs to it after the last.
 *
 * ```ts
 * const { studio, upstream, database } = withStudio({ upstream: (response) => … });
 * ```
 */
export function withStudio<Other extends string = never>(
  options: StudioOptions<Other> = {},
): StudioSystem<Other> {
  const system = new StudioSystem(options);
  beforeAll(() => system.startAll());
  afterAll(() => system.closeAll());
  return system;
}

export function providerOf({ upstream }: ModelOptions): TestProvider | undefined {
  return typeof upstream === 'function' ? new Upstream(upstream) : upstream;
}

/** MODEL_PROVIDERS for a provider that listens. */
export function modelVariables({ providers = {} }: ModelOptions, provider?: TestProvider): Variables {
  if (!provider) return {};
  const fields = { type: 'openai-compatible', base_url: provider.url };
  const all = Object.entries({ upstream: {}, ...providers }).map(([name, own]) => [
    name,
    { ...fields, ...own },
  ]);
  return { MODEL_PROVIDERS: JSON.stringify(Object.fromEntries(all)) };
}

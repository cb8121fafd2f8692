import { afterAll, beforeAll } from '@jest/globals';
import { newMigratedDatabase } from './database.js';
import { ServerProcess } from './studio-process.js';
import { Upstream } from './upstream.js';
import { modelVariables, providerOf } from './with-studio.js';
import type { ModelOptions, TestProvider } from './with-studio.js';

export interface ProcessesOptions extends ModelOptions {
  /** Variables of the configuration of all processes. */
  env?: Record<string, string>;
}

/** A database, the built server as processes of its own on it, and a model provider. */
export class ProcessSystem {
  readonly database = newMigratedDatabase();
  private readonly provider: TestProvider | undefined;
  private readonly servers: ServerProcess[] = [];

  constructor(private readonly options: ProcessesOptions) {
    this.provider = providerOf(options);
  }

  /** The provider that answers as `upstream` says. */
  get upstream(): Upstream {
    if (this.provider instanceof Upstream) return this.provider;
    throw new Error('This system has no upstream of its own.');
  }

  /** Starts a process, which is killed at the end of the file unless it has ended. */
  async start(env: Record<string, string> = {}): Promise<ServerProcess> {
    const server = await ServerProcess.start({
      DATABASE_URL: this.database.url,
      ...modelVariables(this.options, this.provider),
      ...this.options.env,
      ...env,
    });
    this.servers.push(server);
    return server;
  }

  async prepare(): Promise<void> {
    await this.provider?.listen();
    await this.database.create();
  }

  /** Kills all that it has started. */
  async killAll(): Promise<void> {
    await Promise.all(this.servers.splice(0).map((server) => server.stop('SIGKILL')));
  }

  async end(): Promise<void> {
    await this.killAll();
    await this.database.drop();
    await this.provider?.stop();
  }
}

/** {@link withStudio} for what can only be seen from outside: the test starts the processes itself. */
export function withProcesses(options: ProcessesOptions = {}): ProcessSystem {
  const system = new ProcessSystem(options);
  beforeAll(() => system.prepare());
  afterAll(() => system.end());
  return system;
}

import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { Client } from 'pg';
import { answers, createNginx, findNginx, urlOf } from './nginx.mjs';
import { freePort, isFree } from './ports.mjs';
import { StackPostgres } from './postgres.mjs';
import { StackRedis } from './redis.mjs';
import { PortTakenError, StackProcess } from './stack-process.mjs';

const DIST = resolve(import.meta.dirname, '../../dist');
const HOST = '127.0.0.1';
/** Beyond SHUTDOWN_GRACE_MS a server gives itself 10 s; what takes longer hangs. */
const STOP_MS = 15_000;
/** Connections to PostgreSQL that a process opens beside its pool, generously (docs/operations.md, Sizing). */
const OTHER_CONNECTIONS = 30;

/**
 * @typedef {object} StackOptions
 * @property {number} [api] processes with ROLE=api; 2 by default
 * @property {number} [workers] processes with ROLE=worker; 2 by default
 * @property {boolean} [nginx] whether there is an nginx in front of the api processes; true by default
 * @property {string} [host] where nginx listens, or the api processes without it; 127.0.0.1 by default, where all others
 *   listen in any case
 * @property {number} [port] of nginx, or of the first api process without it; 0, the default, takes a free one
 * @property {Record<string, string>} [env] configuration variables of the servers; nothing wins over the stack's own
 *   HOST, PORT, ROLE, DATABASE_URL and REDIS_URL
 * @property {boolean} [inheritEnv] whether the servers get the environment of this process, too; false by default
 * @property {string} [folder] for logs and data; by default a temporary one, which is removed in the end
 * @property {string} [databaseUrl] a PostgreSQL to use in place of the stack's own
 * @property {string} [postgresFolder] where the data of the stack's own PostgreSQL go; by default into `folder`
 * @property {Record<string, string>} [postgresSettings] of the stack's own PostgreSQL, e.g. `{max_connections: '300'}`
 * @property {boolean} [redis] whether the stack has a Redis of its own for the queue; false by default
 * @property {string} [redisUrl] a Redis for the queue
 * @property {(message: string) => void} [log] hears of ends and restarts
 * @property {string} [dist] the built server; this repository's by default
 */

/**
 * Several processes of the server as one system: PostgreSQL, api processes, workers, and nginx in front. All listen on
 * this machine only, on ports that stay theirs over restarts, and none outlives the process that started them.
 */
export class Stack {
  /**
   * nginx, or the first api process where there is none.
   *
   * @type {string}
   */
  url = '';
  /** @type {string} */
  databaseUrl = '';
  /** Empty, if the queue is on PostgreSQL. */
  redisUrl = '';
  /** @type {StackProcess[]} */
  apis = [];
  /** @type {StackProcess[]} */
  workers = [];
  /** @type {StackProcess | undefined} */
  nginx;
  /** @type {StackPostgres | undefined} */
  postgres;
  /** @type {StackRedis | undefined} */
  redis;
  /**
   * Holds `logs/<name>.log` of each process, and the data.
   *
   * @type {string}
   */
  folder = '';
  #options;
  /**
   * That of the servers.
   *
   * @type {import('../../src/config.js').Config}
   */
  #config;
  /** @type {Promise<void> | undefined} */
  #started;
  /** @type {Promise<void> | undefined} */
  #stopped;

  /** @param {StackOptions} [options] */
  constructor(options = {}) {
    this.#options = { ...DEFAULTS, ...options };
  }

  /**
   * Starts a stack. Resolves once every process listens and nginx answers; if one does not get there, rejects with what
   * it said, and leaves nothing behind.
   *
   * @param {StackOptions} [options]
   */
  static async start(options) {
    const stack = new Stack(options);
    await stack.start();
    return stack;
  }

  /** For those who may want to {@link stop} it before it has started: it then rejects. */
  async start() {
    this.#started = this.#start();
    try {
      await this.#started;
    } catch (error) {
      await this.stop();
      throw error;
    }
  }

  async #start() {
    for (const step of [this.#prepare, this.#startData, this.#startServers, this.#startNginx]) {
      if (this.#stopped) throw new Error('The stack was stopped before it had started.');
      await step.call(this);
    }
  }

  /**
   * Ends everything: first the workers, whose executions end or are handed back while the api processes still stream
   * them, and the database last. Calling it again changes nothing.
   *
   * @returns {Promise<void>}
   */
  stop() {
    this.#stopped ??= this.#stop();
    return this.#stopped;
  }

  /** What each process wrote last: for the report of a failed test. */
  get output() {
    return this.#all()
      .map(({ name, starts, pid, output }) => `== ${name}, started ${starts} times, pid ${pid}\n${output}`)
      .join('\n');
  }

  #all() {
    const processes = [this.postgres, this.redis, ...this.apis, ...this.workers, this.nginx];
    return processes.filter((process) => process !== undefined);
  }

  async #prepare() {
    const { dist, folder, nginx, host, port, databaseUrl = '', redisUrl = '' } = this.#options;
    if (!existsSync(join(dist, 'main.js'))) {
      throw new Error(`There is no build in ${dist}. Make one with: npm run build`);
    }
    if (nginx && !findNginx()) throw new Error('nginx is not installed.');
    this.databaseUrl = databaseUrl;
    this.redisUrl = redisUrl;
    this.#config = await this.#readConfig(); // a bad one is said before anything runs
    if (port !== 0 && !(await isFree(port, host))) {
      throw new PortTakenError({ name: nginx ? 'nginx' : 'api-1', host, port });
    }
    this.folder = folder ? resolve(folder) : await mkdtemp(join(tmpdir(), 'agent-studio-stack-'));
    await mkdir(join(this.folder, 'logs'), { recursive: true });
  }

  async #startData() {
    const { redis, databaseUrl, log } = this.#options;
    if (redis) {
      const logFile = this.#logFile('redis');
      this.redis = await StackRedis.create({ folder: this.folder, logFile, log });
      await this.redis.start();
      this.redisUrl = this.redis.url;
    }
    if (databaseUrl) {
      await checkDatabase(databaseUrl);
    } else {
      this.postgres = await this.#createPostgres();
      await this.postgres.start();
      this.databaseUrl = this.postgres.url;
    }
  }

  async #createPostgres() {
    const { dist, api, workers, postgresFolder, postgresSettings, log } = this.#options;
    const connections = (api + workers + 1) * (this.#config.DATABASE_POOL_SIZE + OTHER_CONNECTIONS);
    const { startEmbeddedPostgres } = await importFrom(dist, 'database/embedded-postgres.js');
    return new StackPostgres({
      startEmbedded: startEmbeddedPostgres,
      folder: postgresFolder ?? this.folder,
      port: await freePort(),
      settings: { max_connections: String(Math.max(connections, 200)), ...postgresSettings },
      log,
    });
  }

  async #startServers() {
    const { api, workers, nginx, host, port } = this.#options;
    for (let index = 0; index < api; index++) {
      const where = nginx ? {} : { host, port: index === 0 ? port : 0 };
      this.apis.push(await this.#createServer(`api-${index + 1}`, 'api', where));
    }
    for (let index = 0; index < workers; index++) {
      this.workers.push(await this.#createServer(`worker-${index + 1}`, 'worker'));
    }
    await Promise.all([...this.apis, ...this.workers].map((server) => server.start()));
    this.url = this.apis[0]?.url ?? '';
  }

  /**
   * @param {string} name
   * @param {'api' | 'worker'} role
   * @param {{ host?: string, port?: number }} [where]
   */
  async #createServer(name, role, { host = HOST, port: given = 0 } = {}) {
    const { dist, log } = this.#options;
    const port = given || (await freePort());
    const url = urlOf(host, port);
    return new StackProcess({
      name,
      host,
      port,
      url,
      log,
      logFile: this.#logFile(name),
      stopMs: this.#config.SHUTDOWN_GRACE_MS + STOP_MS,
      command: {
        program: process.execPath,
        args: ['--max-semi-space-size=64', join(dist, 'main.js')],
        env: { ...this.#environment(), HOST: host, PORT: String(port), ROLE: role },
        cwd: this.folder, // where no .env is
      },
      answers: () => answers(`${url}/health/live`),
    });
  }

  async #startNginx() {
    const { nginx, host, port, log } = this.#options;
    if (!nginx) return;
    this.nginx = await createNginx({
      program: findNginx() ?? 'nginx',
      folder: this.folder,
      host,
      port: port || (await freePort()),
      servers: this.apis.map((api) => `${api.host}:${api.port}`),
      maxBodyBytes: this.#config.MAX_BODY_BYTES,
      logFile: this.#logFile('nginx'),
      log,
    });
    await this.nginx.start();
    this.url = this.nginx.url;
  }

  async #stop() {
    await this.#end();
    // What a start that was under way has started meanwhile.
    await this.#started?.catch(() => undefined);
    await this.#end();
    if (this.folder && !this.#options.folder) {
      await rm(this.folder, { recursive: true, force: true, maxRetries: 5 });
    }
  }

  async #end() {
    for (const layer of [this.workers, this.apis, [this.nginx], [this.redis, this.postgres]]) {
      await Promise.all(layer.map(async (process) => process?.stop()));
    }
  }

  /** Throws the server's own words about what is wrong with it. */
  async #readConfig() {
    const { loadConfig } = await importFrom(this.#options.dist, 'config.js');
    return loadConfig({ ...this.#environment(), ROLE: 'all' });
  }

  /** @returns {NodeJS.ProcessEnv} */
  #environment() {
    const { PATH, HOME } = process.env;
    const { env, inheritEnv } = this.#options;
    const own = { DATABASE_URL: this.databaseUrl, REDIS_URL: this.redisUrl };
    return { ...(inheritEnv ? process.env : { PATH, HOME }), ...env, ...own };
  }

  /** @param {string} name */
  #logFile(name) {
    return join(this.folder, 'logs', `${name}.log`);
  }
}

const DEFAULTS = {
  api: 2,
  workers: 2,
  nginx: true,
  host: HOST,
  port: 0,
  env: {},
  inheritEnv: false,
  redis: false,
  log: (/** @type {string} */ _message) => {},
  dist: DIST,
};

/**
 * @param {string} dist
 * @param {string} file
 */
function importFrom(dist, file) {
  return import(pathToFileURL(join(dist, file)).href);
}

/**
 * Several processes that can't reach it would all say so, each in its own time.
 *
 * @param {string} url
 */
async function checkDatabase(url) {
  const client = new Client({ connectionString: url, connectionTimeoutMillis: 10_000 });
  try {
    await client.connect();
  } catch (error) {
    const help = "Start it, or set DATABASE_URL to nothing for one of the stack's own.";
    throw new Error(`The database of DATABASE_URL can't be used: ${error.message || error.code}. ${help}`, {
      cause: error,
    });
  } finally {
    await client.end();
  }
}

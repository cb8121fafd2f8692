import { readFileSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { lastLines, sendSignal } from './supervised.mjs';

/** The ways to shut a server down, in the words of pg_ctl, and what it is sent. */
const SIGNALS = /** @type {const} */ ({ fast: 'SIGINT', immediate: 'SIGQUIT', SIGKILL: 'SIGKILL' });

/**
 * The stack's own PostgreSQL: the embedded one, which starts itself again when it ends by itself, on a port that stays
 * the same.
 */
export class StackPostgres {
  name = 'postgres';
  /** How often it was started by {@link start}. */
  starts = 0;
  /** postgres:// URL of its database; the same after each start. */
  url = '';
  #startEmbedded;
  #folder;
  #settings;
  #log;
  /** @type {Promise<import('../../src/database/embedded-postgres.js').EmbeddedPostgres> | undefined} */
  #server;
  /** @type {number[]} */
  #paused = [];

  /**
   * @param {object} options
   * @param {typeof import('../../src/database/embedded-postgres.js').startEmbeddedPostgres} options.startEmbedded
   * @param {string} options.folder the data goes into its `postgres/data`
   * @param {number} options.port
   * @param {Record<string, string>} options.settings of the server
   * @param {(message: string) => void} options.log
   */
  constructor({ startEmbedded, folder, port, settings, log }) {
    /** @readonly */
    this.port = port;
    this.#startEmbedded = startEmbedded;
    this.#folder = folder;
    this.#settings = settings;
    this.#log = log;
  }

  /** Of the postmaster; undefined while there is none. */
  get pid() {
    try {
      return Number.parseInt(readFileSync(join(this.#folder, 'postgres/data/postmaster.pid'), 'utf8'), 10);
    } catch {
      return undefined; // it removes the file when it ends in good order
    }
  }

  /** The last lines of its log. */
  get output() {
    return lastLines(join(this.#folder, 'postgres.log'));
  }

  /** Starts it unless it runs; resolves when it answers queries. */
  async start() {
    this.#server ??= this.#startEmbedded({
      dataDir: this.#folder,
      port: this.port,
      serverOptions: this.#settings,
      log: this.#log,
    });
    try {
      this.url = (await this.#server).url;
      this.starts++;
    } catch (error) {
      this.#server = undefined;
      throw error;
    }
  }

  /**
   * Stops it, paused or not, and resolves when it has ended. It stays so until {@link start}.
   *
   * @param {'fast' | 'immediate' | 'SIGKILL'} [mode] fast: cuts the connections and writes everything out; immediate: it
   *   recovers at its next start, as after a crash; SIGKILL: the postmaster dies, and its children notice
   */
  async stop(mode = 'fast') {
    const server = await this.#server?.catch(() => undefined);
    if (!server) return;
    this.#server = undefined;
    const stopped = server.stop(); // from here on it is not started again
    this.kill(SIGNALS[mode]);
    this.resume();
    await stopped;
  }

  /**
   * Sends a signal to the postmaster. If it ends by that, it is started again.
   *
   * @param {NodeJS.Signals} [signal]
   * @returns {boolean} whether there was one
   */
  kill(signal = 'SIGKILL') {
    const { pid } = this;
    return pid !== undefined && sendSignal(pid, signal);
  }

  /** Stops the server and all its processes where they are (Linux): connections stay open, and nothing answers. */
  pause() {
    const { pid } = this;
    if (pid === undefined) throw new Error('PostgreSQL does not run.');
    sendSignal(pid, 'SIGSTOP'); // from here on it starts no processes
    this.#paused = [pid, ...childrenOf(pid)];
    for (const process of this.#paused) sendSignal(process, 'SIGSTOP');
  }

  /** Lets a paused server go on. */
  resume() {
    for (const process of this.#paused.splice(0)) sendSignal(process, 'SIGCONT');
  }
}

/** @param {number} parent */
function childrenOf(parent) {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => parentOf(pid) === parent);
}

/**
 * Field 4 of proc_pid_stat(5).
 *
 * @param {number} pid
 */
function parentOf(pid) {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    return Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[1]);
  } catch {
    return undefined; // it has ended
  }
}

import { existsSync, readFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';

/** The pause before a restart doubles while the program does not last, as in Docker's restart policies. */
const FIRST_PAUSE_MS = 100;
const LONGEST_PAUSE_MS = 30_000;
/** What ran for so long did not fail at once: the pauses begin anew. */
const LASTING_MS = 10_000;
const OUTPUT_LINES = 30;
const OUTPUT_COLUMNS = 400;

/**
 * How a process ended, as `child_process` says it.
 *
 * @typedef {{ code: number | null, signal: NodeJS.Signals | null }} Exit
 */

/**
 * One life of a program.
 *
 * @typedef {{ pid: number, begunAt: number, isReady?: boolean }} Run
 */

/** A program that is started again when it ends and nobody has stopped it. */
export class Supervised {
  /** How often its process was started. */
  starts = 0;
  /** @type {Run | undefined} */
  #run;
  /** @type {Promise<Exit> | undefined} */
  #lastExit;
  /** @type {Promise<void> | undefined} */
  #ready;
  /** @type {NodeJS.Timeout | undefined} */
  #timer;
  #isWanted = false;
  #pauseMs = FIRST_PAUSE_MS;

  /**
   * @param {object} options
   * @param {string} options.name
   * @param {number} options.stopMs how long {@link stop} waits before it sends SIGKILL
   * @param {(message: string) => void} options.log hears of ends and restarts
   */
  constructor({ name, stopMs, log }) {
    /** @readonly */
    this.name = name;
    this.log = log;
    this.stopMs = stopMs;
  }

  /** Of the process that runs now; undefined while there is none. */
  get pid() {
    return this.#run?.pid;
  }

  /** Resolves when the process that runs now, or that ran last, has ended. */
  get exited() {
    if (!this.#lastExit) throw new Error(`${this.name} was never started.`);
    return this.#lastExit;
  }

  /**
   * Starts it unless it runs, on the same port each time. Resolves when it is ready; rejects if it does not get there,
   * with the last lines that it wrote, and leaves it stopped.
   *
   * @returns {Promise<void>}
   */
  async start() {
    this.#isWanted = true;
    clearTimeout(this.#timer);
    try {
      await this.#up();
    } catch (error) {
      this.#isWanted = false;
      clearTimeout(this.#timer);
      throw error;
    }
  }

  /**
   * Ends it, also where it was stopped by SIGSTOP, and resolves when it has ended. It stays so until {@link start}.
   *
   * @param {NodeJS.Signals} [signal]
   * @returns {Promise<void>}
   */
  async stop(signal = 'SIGTERM') {
    this.#isWanted = false;
    clearTimeout(this.#timer);
    // In the middle of a start there may be no process yet.
    if (!this.#run) await this.#ready?.catch(() => undefined);
    if (!this.#run) return;
    const { exited } = this;
    this.kill(signal);
    this.kill('SIGCONT');
    const patience = setTimeout(() => {
      this.log(`${this.name} did not end within ${this.stopMs / 1000} s, and is killed.`);
      this.kill('SIGKILL');
    }, this.stopMs);
    await exited;
    clearTimeout(patience);
  }

  /**
   * {@link stop}, then {@link start}.
   *
   * @param {NodeJS.Signals} [signal]
   */
  async restart(signal) {
    await this.stop(signal);
    await this.start();
  }

  /**
   * Sends a signal to the process that runs now. If it ends by that, it is started again.
   *
   * @param {NodeJS.Signals} [signal]
   * @returns {boolean} whether there was a process
   */
  kill(signal = 'SIGKILL') {
    return this.#run !== undefined && sendSignal(this.#run.pid, signal);
  }

  /**
   * Makes one start: calls {@link begun} as soon as there is a process, and resolves when that is ready.
   *
   * @protected
   * @abstract
   * @returns {Promise<void>}
   */
  launch() {
    throw new Error('not implemented');
  }

  /**
   * @protected
   * @param {number} pid
   * @param {Promise<Exit>} exited
   */
  begun(pid, exited) {
    /** @type {Run} */
    const run = { pid, begunAt: Date.now() };
    this.starts++;
    this.#run = run;
    this.#lastExit = exited.then((exit) => {
      this.#run = undefined;
      // A start that fails is told to whoever wanted it.
      if (run.isReady) {
        this.#ready = undefined;
        this.#startAgain(describe(exit), run);
      }
      return exit;
    });
  }

  /** One start at a time: whoever wants it up waits for the same. */
  #up() {
    this.#ready ??= this.#launch();
    return this.#ready;
  }

  async #launch() {
    try {
      await this.launch();
      if (!this.#run) throw new Error(`${this.name} ended as soon as it was ready.`);
      this.#run.isReady = true;
    } catch (error) {
      this.#ready = undefined;
      throw error;
    }
  }

  /**
   * @param {string} what
   * @param {Run} [run]
   */
  #startAgain(what, run) {
    if (!this.#isWanted) return;
    const hasLasted = run !== undefined && Date.now() - run.begunAt >= LASTING_MS;
    this.#pauseMs = hasLasted ? FIRST_PAUSE_MS : this.#pauseMs;
    this.log(`${this.name} ${what}. It is started again in ${this.#pauseMs / 1000} s.`);
    this.#timer = setTimeout(() => {
      this.#up().then(
        () => this.log(`${this.name} is back, as process ${this.pid}.`),
        (error) => this.#startAgain(`did not start: ${error.message}`),
      );
    }, this.#pauseMs);
    this.#pauseMs = Math.min(this.#pauseMs * 2, LONGEST_PAUSE_MS);
  }
}

/** @param {Exit} exit */
function describe({ code, signal }) {
  if (signal !== null) return `was ended by ${signal}`;
  return code === null ? 'has ended' : `ended with exit code ${code}`;
}

/**
 * @param {number} pid of a process, or a process group as a negative number
 * @param {NodeJS.Signals} signal
 * @returns {boolean} whether there is such a process
 */
export function sendSignal(pid, signal) {
  try {
    return process.kill(pid, signal);
  } catch (error) {
    if (error.code === 'ESRCH') return false;
    throw error;
  }
}

/**
 * Resolves once `condition` holds.
 *
 * @param {() => Promise<boolean> | boolean} condition
 * @param {number} pauseMs between two tries
 */
export async function until(condition, pauseMs = 50) {
  while (!(await condition())) await sleep(pauseMs);
}

/**
 * The end of a log, for people; empty where there is none.
 *
 * @param {string} file
 */
export function lastLines(file) {
  if (!existsSync(file)) return '';
  const lines = readFileSync(file, 'utf8').trimEnd().split('\n').slice(-OUTPUT_LINES);
  return lines.map((line) => line.slice(0, OUTPUT_COLUMNS)).join('\n');
}

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, openSync } from 'node:fs';
import { isTaken } from './ports.mjs';
import { Supervised, lastLines, sendSignal, until } from './supervised.mjs';

const START_TIMEOUT_MS = 120_000;
/** How long the port of a process that died may stay taken. */
const LEFTOVERS_MS = 2000;

/**
 * Becomes the program, and leaves behind a watcher that reads descriptor 3: its end means that the process that started
 * all this is gone, however it ended. Then the program gets SIGTERM (and SIGCONT, should it be stopped). The watcher is
 * detached twice, so that it is no child of the program.
 */
const START_SCRIPT = `
( sh -c 'read -r _ <&3; kill -TERM "$0"; kill -CONT "$0"' $$ </dev/null >/dev/null 2>&1 & )
exec "$@" 3<&-`;

/**
 * What a {@link StackProcess} runs. `env` is the whole environment.
 *
 * @typedef {{ program: string, args: string[], env: NodeJS.ProcessEnv, cwd: string }} Command
 */

/** A program that listens on a port of its own, as a process. */
export class StackProcess extends Supervised {
  /** @type {Command} */
  #command;
  /** @type {() => Promise<boolean>} */
  #answers;
  /** The first start begins a new log. */
  #hasLog = false;

  /**
   * @param {object} options
   * @param {string} options.name
   * @param {string} options.host
   * @param {number} options.port
   * @param {string} options.url
   * @param {Command} options.command
   * @param {() => Promise<boolean>} options.answers whether the program can be used
   * @param {string} options.logFile gets what it writes, from its first start on
   * @param {number} options.stopMs
   * @param {(message: string) => void} options.log
   */
  constructor({ host, port, url, command, answers, logFile, ...options }) {
    super(options);
    /** @readonly */
    this.host = host;
    /** @readonly */
    this.port = port;
    /** @readonly */
    this.url = url;
    /** @readonly */
    this.logFile = logFile;
    this.#command = command;
    this.#answers = answers;
  }

  /** The last lines that it wrote, over all its starts. */
  get output() {
    return lastLines(this.logFile);
  }

  /** @override */
  async launch() {
    await this.#untilPortIsFree();
    const child = this.#spawn();
    const { pid } = child;
    if (pid === undefined) {
      const [error] = await once(child, 'error');
      throw new Error(`${this.name} can't be started: ${error.message}`);
    }
    let hasEnded = false;
    /** @type {Promise<import('./supervised.mjs').Exit>} */
    const exited = new Promise((resolve) => {
      child.once('exit', (code, signal) => {
        hasEnded = true;
        resolve({ code, signal });
      });
    });
    // What it left behind in its process group, such as nginx's workers and the watcher, goes with it.
    void exited.then(() => sendSignal(-pid, 'SIGKILL'));
    this.begun(pid, exited);
    const timeout = setTimeout(() => child.kill('SIGKILL'), START_TIMEOUT_MS);
    await until(async () => hasEnded || this.#answers());
    clearTimeout(timeout);
    if (hasEnded) {
      const lines = `The last lines of ${this.logFile}:\n${this.output}`;
      throw new Error(`${this.name} ended before it could be used. ${lines}`);
    }
  }

  /** What it left behind when it died goes in a moment; anything else is another program. */
  async #untilPortIsFree() {
    const giveUpAt = Date.now() + (this.starts === 0 ? 0 : LEFTOVERS_MS);
    await until(async () => {
      const isOurs = !(await isTaken(this.port, this.host));
      if (!isOurs && Date.now() >= giveUpAt) throw new PortTakenError(this);
      return isOurs;
    });
  }

  #spawn() {
    const { program, args, env, cwd } = this.#command;
    const log = openSync(this.logFile, this.#hasLog ? 'a' : 'w', 0o600);
    this.#hasLog = true;
    try {
      const child = spawn('/bin/sh', ['-c', START_SCRIPT, 'sh', program, ...args], {
        env,
        cwd,
        // A session of its own: Ctrl-C must reach the stack alone, which ends the processes in their order.
        detached: true,
        stdio: ['ignore', log, log, 'pipe'],
      });
      child.stdio[3]?.on('error', () => undefined); // the watcher may go first
      return child;
    } finally {
      closeSync(log);
    }
  }
}

/** Somebody else listens where a process of the stack is to listen. */
export class PortTakenError extends Error {
  /** @param {{ name: string, host: string, port: number }} where */
  constructor({ name, host, port }) {
    super(`The port ${port} of ${host}, meant for ${name}, is taken by another program.`);
    this.port = port;
  }
}

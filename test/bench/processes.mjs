// Starts, pins, questions and ends the processes of the benchmark.
import { execFileSync, spawn } from 'node:child_process';
import { readFileSync, readdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const CHILD = fileURLToPath(new URL('./child.mjs', import.meta.url));
/** Of /proc, on every architecture of Linux that Node.js runs on (USER_HZ is 100). */
const TICK_US = 10_000;
const ANSWER_TIMEOUT_MS = 120_000;
const END_TIMEOUT_MS = 3000;

/**
 * Puts this process, and with it all that it starts, on one core, so that another one is free for the server alone.
 * @returns `{server, others, all}`: the two cores, and a list of all that there are; or `{reason}` why there is no pinning here
 */
export function pin() {
  const list = readStatus(process.pid, 'Cpus_allowed_list');
  if (list === undefined) return { reason: 'this system has no /proc' };
  const [server, others] = list.split(',').flatMap((range) => {
    const [first, last = first] = range.split('-').map(Number);
    return Array.from({ length: last - first + 1 }, (_, index) => first + index);
  });
  if (others === undefined) return { reason: 'this process may use one core only' };
  try {
    execFileSync('taskset', ['-a', '-c', '-p', String(others), String(process.pid)], { stdio: 'ignore' });
  } catch (error) {
    return {
      reason: error.code === 'ENOENT' ? 'there is no taskset here' : `taskset failed: ${error.message}`,
    };
  }
  return { server, others, all: list };
}

/** A Node.js process of the benchmark, with child.mjs in it. */
export class Child {
  /**
   * @param options.core core to run on, or a list of them as taskset takes it; undefined: the benchmark's own
   * @param options.onDeath called with an Error when the process ends and nobody asked it to
   */
  constructor(name, { args, env = {}, cwd, core, onDeath }) {
    this.name = name;
    this.questions = new Map();
    this.ending = false;
    this.hasEnded = false;
    const command = [process.execPath, '--max-semi-space-size=64', '--import', CHILD, ...args];
    const [file, ...rest] = core === undefined ? command : ['taskset', '-c', String(core), ...command];
    // Nothing of a developer's environment reaches it: the figures shall not depend on that.
    const { PATH, HOME } = process.env;
    this.process = spawn(file, rest, {
      cwd,
      env: { PATH, HOME, ...env },
      stdio: ['ignore', 2, 2, 'ipc'],
      // A Ctrl-C reaches the benchmark alone, which ends the others in their order.
      detached: true,
    });
    this.exited = new Promise((resolve) => this.process.on('exit', resolve));
    /** Resolves with what the process says when it is ready: a server's is its port. */
    this.ready = new Promise((resolve, reject) => {
      this.onReady = { resolve, reject };
    });
    this.ready.catch(() => undefined); // `onDeath` tells the same
    this.process.on('message', (message) => {
      if (message.ready === undefined) this.settle(message);
      else this.onReady.resolve(message.ready);
    });
    const died = (why) => {
      this.hasEnded = true;
      const error = new Error(`The process "${name}" ${why}.`);
      this.onReady.reject(error);
      for (const { reject } of this.questions.values()) reject(error);
      if (!this.ending) onDeath(error);
    };
    this.process.on('error', (error) => died(`did not start: ${error.message}`));
    this.process.on('exit', (code, signal) => died(`ended with ${code ?? signal}`));
  }

  /** Resolves with the answer of the process to one of its questions (see child.mjs). */
  ask(question, argument) {
    const id = (this.lastId = (this.lastId ?? 0) + 1);
    return new Promise((resolve, reject) => {
      const timer = setTimeout(
        () => reject(new Error(`The process "${this.name}" did not answer "${question}".`)),
        ANSWER_TIMEOUT_MS,
      );
      const settled = (settle) => (value) => {
        clearTimeout(timer);
        this.questions.delete(id);
        settle(value);
      };
      this.questions.set(id, { resolve: settled(resolve), reject: settled(reject) });
      this.process.send(
        { id, question, argument },
        (error) => error && this.questions.get(id)?.reject(error),
      );
    });
  }

  settle({ id, answer, error }) {
    const question = this.questions.get(id);
    if (error === undefined) question?.resolve(answer);
    else question?.reject(new Error(`The process "${this.name}" failed: ${error}`));
  }

  /** Ends it: kindly, then by force. */
  async end() {
    this.ending = true;
    if (this.hasEnded) return;
    this.process.kill('SIGTERM');
    const force = setTimeout(() => this.process.kill('SIGKILL'), END_TIMEOUT_MS);
    await this.exited;
    clearTimeout(force);
  }

  /** Kills it, as the system does when memory runs out; resolves when it is gone. */
  async kill() {
    this.ending = true;
    this.process.kill('SIGKILL');
    await this.exited;
  }
}

/** CPU µs of a PostgreSQL server and its backends, those that have ended included; undefined without /proc. */
export function postgresCpu(postmaster) {
  if (postmaster === undefined) return undefined;
  const own = readStat(postmaster);
  if (own === undefined) return undefined;
  let ticks = own.cpu + own.endedChildren;
  for (const name of readdirSync('/proc')) {
    if (!/^\d+$/.test(name)) continue;
    const stat = readStat(name);
    if (stat?.parent === postmaster) ticks += stat.cpu;
  }
  return ticks * TICK_US;
}

/** The PostgreSQL server that one of its backends belongs to; undefined where it runs on another machine. */
export function postmasterOf(backend) {
  const stat = readStat(backend);
  return stat?.name === 'postgres' ? stat.parent : undefined;
}

/** CPU µs that all programs of the machine have used so far; undefined without /proc. */
export function machineCpu() {
  try {
    const [, user, nice, system] = readFileSync('/proc/stat', 'utf8').split(/\s+/, 4).map(Number);
    return (user + nice + system) * TICK_US;
  } catch {
    return undefined; // not Linux
  }
}

/** Bytes of a process in memory; undefined without /proc. */
export function residentBytes(pid) {
  const text = readStatus(pid, 'VmRSS');
  return text === undefined ? undefined : Number.parseInt(text, 10) * 1024;
}

/** Fields of proc_pid_stat(5), times in ticks; undefined if the process has ended. */
function readStat(pid) {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, 'utf8');
    const nameEnd = text.lastIndexOf(')');
    const fields = text.slice(nameEnd + 2).split(' ');
    const [user, system, endedUser, endedSystem] = fields.slice(11, 15).map(Number);
    const name = text.slice(text.indexOf('(') + 1, nameEnd);
    return { name, parent: Number(fields[1]), cpu: user + system, endedChildren: endedUser + endedSystem };
  } catch {
    return undefined; // it has ended between two reads, or this is not Linux
  }
}

function readStatus(pid, key) {
  try {
    return new RegExp(`^${key}:\\s*(.*)$`, 'm').exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1];
  } catch {
    return undefined; // not Linux
  }
}

import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { readFile, readdir } from 'node:fs/promises';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

const DIST = new URL('../../dist/', import.meta.url);
const MAIN = fileURLToPath(new URL('main.js', DIST));
/** What the probe counts objects with is still an experiment of Node's, which says so each time. */
const PROBED = [
  '--import',
  new URL('heap-probe.mjs', import.meta.url).href,
  '--import',
  new URL('loop-probe.mjs', import.meta.url).href,
  '--disable-warning=ExperimentalWarning',
];

/** What the server's memory holds after a garbage collection. */
interface Held {
  /** Objects of the class that was asked for. */
  count: number;
  /** Bytes of JavaScript's heap and of the buffers that belong to it. */
  held: number;
}
type ProbeAnswer<Answer> = { id: number } & (Answer | { error: string });

/** The built server as a process of its own, for what can only be seen from outside: its memory, and its death. */
export class ServerProcess {
  private questions = 0;

  private constructor(
    readonly url: string,
    readonly process: ChildProcess,
  ) {}

  /** Starts `dist/main.js` on a free port; `env` are variables of its configuration. */
  static async start(env: Record<string, string>): Promise<ServerProcess> {
    const child = spawn(process.execPath, [...PROBED, MAIN], {
      env: { PATH: process.env.PATH, LOG_LEVEL: 'info', PORT: '0', ...env },
      stdio: ['ignore', 'pipe', 'inherit', 'ipc'],
    });
    const { stdout } = child;
    if (!stdout) throw new Error('The server has no output.');
    for await (const line of createInterface({ input: stdout })) {
      const { url } = JSON.parse(line) as { url?: string };
      if (!url) continue;
      stdout.resume();
      return new ServerProcess(url, child);
    }
    throw new Error(`The server ended before it listened: exit code ${child.exitCode}.`);
  }

  /** Bytes of memory that the process holds now, and the most that it ever held (Linux). */
  async memory(): Promise<{ now: number; peak: number }> {
    const status = await readFile(`/proc/${this.process.pid}/status`, 'utf8');
    const bytes = (field: string) =>
      Number(new RegExp(`^${field}:\\s+(\\d+) kB`, 'm').exec(status)?.[1]) * 1024;
    return { now: bytes('VmRSS'), peak: bytes('VmHWM') };
  }

  /** How many files, sockets and pipes the process has open (Linux). */
  async openDescriptors(): Promise<number> {
    return (await readdir(`/proc/${this.process.pid}/fd`)).length;
  }

  /** Connections of clients that the process has not closed, as the kernel counts them (Linux). */
  async clientConnections(): Promise<number> {
    const port = Number(new URL(this.url).port).toString(16).toUpperCase().padStart(4, '0');
    const [, ...lines] = (await readFile('/proc/net/tcp', 'utf8')).trim().split('\n');
    // proc_net_tcp: the local address, the state (0A is LISTEN), and an inode, which is 0 once no process has the socket.
    const sockets = lines.map((line) => line.trim().split(/\s+/));
    return sockets.filter(
      ([, local, , state, , , , , , inode]) => local?.endsWith(`:${port}`) && state !== '0A' && inode !== '0',
    ).length;
  }

  /** A figure of `/metrics`, `labels` as they are written there: `{type="Timeout"}`. 0 if it has none with these labels. */
  async metric(name: string, labels = ''): Promise<number> {
    // The server itself closes the connection, so that asking leaves nothing behind that counts.
    const text = await (await fetch(`${this.url}/metrics`, { headers: { connection: 'close' } })).text();
    if (!text.includes(`# TYPE ${name} `)) throw new Error(`/metrics has nothing named ${name}.`);
    const line = text.split('\n').find((candidate) => candidate.startsWith(`${name}${labels} `));
    return Number(line?.slice(line.lastIndexOf(' ')) ?? 0);
  }

  /**
   * What is still held after a garbage collection: how many objects of an exported class, and how many bytes in all.
   * `module` is `node:…` or a file below `dist`.
   */
  async held(module = 'node:http', name = 'ServerResponse'): Promise<Held> {
    const specifier = module.startsWith('node:') ? module : new URL(module, DIST).href;
    return this.ask<Held>({ module: specifier, name });
  }

  /** The longest time, ms, that the process's event loop did nothing else since this was asked last. */
  async silence(): Promise<number> {
    return (await this.ask<{ silence: number }>({ question: 'silence' })).silence;
  }

  /** Names of members that somebody has given to every object of the process. */
  async pollution(): Promise<string[]> {
    return (await this.ask<{ pollution: string[] }>({ question: 'pollution' })).pollution;
  }

  /** Whether the process has not ended. */
  get lives(): boolean {
    return this.process.exitCode === null && this.process.signalCode === null;
  }

  private async ask<Answer>(question: object): Promise<Answer> {
    const id = ++this.questions;
    this.process.send({ id, ...question });
    for (;;) {
      const [answer] = (await once(this.process, 'message')) as [ProbeAnswer<Answer>];
      if (answer.id !== id) continue;
      if ('error' in answer) throw new Error(answer.error);
      return answer;
    }
  }

  async stop(signal: NodeJS.Signals = 'SIGTERM'): Promise<void> {
    if (!this.lives) return;
    const exited = once(this.process, 'exit');
    this.process.kill(signal);
    await exited;
  }
}

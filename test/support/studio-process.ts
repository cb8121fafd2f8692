import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { readFile } from 'node:fs/promises';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

const MAIN = fileURLToPath(new URL('../../dist/main.js', import.meta.url));

/** The built server as a process of its own, for what can only be seen from outside: its memory, and its death. */
export class ServerProcess {
  private constructor(
    readonly url: string,
    readonly process: ChildProcess,
  ) {}

  /** Starts `dist/main.js` on a free port; `env` are variables of its configuration. */
  static async start(env: Record<string, string>): Promise<ServerProcess> {
    const child = spawn(process.execPath, [MAIN], {
      env: { PATH: process.env.PATH, LOG_LEVEL: 'info', PORT: '0', ...env },
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    for await (const line of createInterface({ input: child.stdout })) {
      const { url } = JSON.parse(line) as { url?: string };
      if (!url) continue;
      child.stdout.resume();
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

  async stop(signal: NodeJS.Signals = 'SIGTERM'): Promise<void> {
    if (this.process.exitCode !== null || this.process.signalCode !== null) return;
    const exited = once(this.process, 'exit');
    this.process.kill(signal);
    await exited;
  }
}

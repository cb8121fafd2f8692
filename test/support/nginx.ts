import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { findNginx } from '../../scripts/stack/nginx.mjs';
import { freePort } from '../../scripts/stack/ports.mjs';
import { until } from './studio.js';

/** The program, if it is installed. */
export const NGINX = findNginx();

/** A real nginx before a server, with all that it has in a folder of its own. Runs as whoever runs the test. */
export class Nginx {
  private process: ChildProcess | undefined;

  private constructor(
    readonly url: string,
    private readonly folder: string,
  ) {}

  /** Starts it on a free port; `readTimeout` is how long the server may be silent, in nginx's notation. */
  static async start(target: string, readTimeout: string): Promise<Nginx> {
    if (!NGINX) throw new Error('nginx is not installed.');
    const port = await freePort();
    const folder = await mkdtemp(join(tmpdir(), 'agent-studio-nginx-'));
    await mkdir(join(folder, 'temp'));
    await writeFile(join(folder, 'nginx.conf'), configuration({ port, target, readTimeout }));
    const nginx = new Nginx(`http://127.0.0.1:${port}`, folder);
    await nginx.start().catch(async (error: unknown) => {
      await nginx.close();
      throw error;
    });
    return nginx;
  }

  /** Starts it again after {@link stop}, on the same port. */
  async start(): Promise<void> {
    const log = join(this.folder, 'error.log');
    const args = ['-p', this.folder, '-c', join(this.folder, 'nginx.conf'), '-e', log];
    const child = spawn(NGINX ?? 'nginx', args, { stdio: 'ignore' });
    this.process = child;
    await until(async () => {
      if (child.exitCode !== null) throw new Error(`nginx ended with ${child.exitCode}: ${await this.log()}`);
      return fetch(`${this.url}/health/live`).then(
        ({ ok }) => ok,
        () => undefined, // does not listen yet
      );
    });
  }

  /** Lets a new worker process begin; the old one keeps its connections until they end. */
  async reload(): Promise<void> {
    const leaving = async () => (await this.log()).split('gracefully shutting down').length;
    const before = await leaving();
    this.process?.kill('SIGHUP');
    await until(async () => (await leaving()) > before);
  }

  /** Stops it at once: what is open is cut. */
  async stop(): Promise<void> {
    const child = this.process;
    if (!child || child.exitCode !== null || child.signalCode !== null) return;
    const exited = once(child, 'exit');
    child.kill('SIGTERM');
    await exited;
  }

  async close(): Promise<void> {
    await this.stop();
    await rm(this.folder, { recursive: true, force: true });
  }

  private log(): Promise<string> {
    return readFile(join(this.folder, 'error.log'), 'utf8');
  }
}

/** Buffering, and HTTP/1.0 towards the server, are nginx's defaults; compression is as bad for streams as it can be. */
function configuration({
  port,
  target,
  readTimeout,
}: {
  port: number;
  target: string;
  readTimeout: string;
}): string {
  // As root it would run its worker as nobody, who may not enter the folder.
  const user = process.getuid?.() === 0 ? 'user root;' : '';
  return `
    ${user}
    daemon off;
    worker_processes 1;
    pid nginx.pid;
    error_log error.log notice;
    events {}
    http {
      access_log off;
      ${['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map((use) => `${use}_temp_path temp/${use};`).join(' ')}
      gzip on;
      gzip_proxied any;
      gzip_types text/event-stream application/json;
      server {
        listen 127.0.0.1:${port};
        location / {
          proxy_pass ${target};
          proxy_read_timeout ${readTimeout};
        }
        location /api/ws {
          proxy_pass ${target};
          proxy_http_version 1.1;
          proxy_set_header Upgrade $http_upgrade;
          proxy_set_header Connection upgrade;
          proxy_read_timeout ${readTimeout};
        }
      }
    }
  `;
}

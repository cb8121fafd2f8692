import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { Redis } from 'ioredis';
import { freePort } from './ports.mjs';
import { StackProcess } from './stack-process.mjs';

const HOST = '127.0.0.1';
const STOP_MS = 10_000;

/** A Redis of the stack's own that loses nothing it has confirmed, as the queue needs it. */
export class StackRedis extends StackProcess {
  /**
   * @param {{ folder: string, logFile: string, log: (message: string) => void }} options
   */
  static async create({ folder, ...options }) {
    const port = await freePort();
    const url = `redis://${HOST}:${port}`;
    const data = join(folder, 'redis');
    await mkdir(data, { recursive: true });
    const settings = {
      bind: HOST,
      port: String(port),
      dir: data,
      save: '',
      appendonly: 'yes',
      appendfsync: 'always',
      'maxmemory-policy': 'noeviction',
    };
    const args = Object.entries(settings).flatMap(([name, value]) => [`--${name}`, value]);
    return new StackRedis({
      ...options,
      name: 'redis',
      host: HOST,
      port,
      url,
      stopMs: STOP_MS,
      command: { program: 'redis-server', args, env: { PATH: process.env.PATH }, cwd: data },
      answers: () =>
        ask(url, (client) => client.ping())
          .then(() => true)
          .catch(() => false),
    });
  }

  /** Empties it, as if it had lost its disk. */
  async flush() {
    await ask(this.url, (client) => client.flushall());
  }
}

/**
 * @template Result
 * @param {string} url
 * @param {(client: Redis) => Promise<Result>} question
 */
async function ask(url, question) {
  const client = new Redis(url, { lazyConnect: true, retryStrategy: () => null, maxRetriesPerRequest: 0 });
  client.on('error', () => undefined); // the call says so, too
  try {
    await client.connect();
    return await question(client);
  } finally {
    client.disconnect();
  }
}

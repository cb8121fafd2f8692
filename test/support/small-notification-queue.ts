import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Client } from 'pg';
import { startEmbeddedPostgres } from '../../src/database/embedded-postgres.js';

const SETTINGS = { fsync: 'off', full_page_writes: 'off', max_notify_queue_pages: '64' };
/** A page of the queue, nearly. */
const PAYLOAD = 'x'.repeat(7900);
const AT_ONCE = 10;
/** So that listeners that live take what was sent. */
const PAUSE_MS = 20;

/** A PostgreSQL of its own whose queue of notifications, which all databases of a server share, has room for 64 pages. */
export class SmallNotificationQueue {
  private constructor(
    readonly url: string,
    private readonly client: Client,
    private readonly end: () => Promise<void>,
  ) {}

  static async start(): Promise<SmallNotificationQueue> {
    const dataDir = await mkdtemp(join(tmpdir(), 'agent-studio-notifications-'));
    const server = await startEmbeddedPostgres({ dataDir, log: () => undefined, serverOptions: SETTINGS });
    const client = new Client({ connectionString: server.url });
    client.on('error', () => undefined); // the server is stopped at the end
    await client.connect();
    return new SmallNotificationQueue(server.url, client, async () => {
      await client.end();
      await server.stop();
      await rm(dataDir, { recursive: true });
    });
  }

  async query<Row extends object>(text: string, values?: unknown[]): Promise<Row[]> {
    return (await this.client.query<Row>(text, values)).rows;
  }

  async usage(): Promise<number> {
    const [row] = await this.query<{ usage: number }>('SELECT pg_notification_queue_usage() AS usage');
    return row?.usage ?? NaN;
  }

  /** Sends notifications that say nothing to anybody until the queue is as full as this: some listener does not take them. */
  async fill(usage: number, channels: string[]): Promise<void> {
    while ((await this.usage()) < usage) {
      await this.query(
        'SELECT pg_notify(channel, $2 || number) FROM unnest($1::text[]) AS channel, generate_series(1, $3::int) AS number',
        [channels, PAYLOAD, AT_ONCE],
      );
      await sleep(PAUSE_MS);
    }
  }

  stop(): Promise<void> {
    return this.end();
  }
}

import { beforeAll, expect, it } from '@jest/globals';
import { Pool } from 'pg';
import { createDataSource } from '../../src/database/data-source.js';
import { queryAtLength } from '../../src/database/query-at-length.js';
import { SlowPool } from '../../src/database/slow-pool.js';
import { StrictClient, timeLimits } from '../../src/database/strict-client.js';
import { isUnavailable } from '../../src/database/unavailable.js';
import { echo, until } from '../support/studio.js';
import { withStudio } from '../support/with-studio.js';

const QUEUE = 5;

const server = withStudio({
  env: {
    DATABASE_SLOW_POOL_SIZE: '2',
    DATABASE_SLOW_QUEUE: String(QUEUE),
    DATABASE_SLOW_TIMEOUT_MS: '60000',
    DATABASE_TIMEOUT_MS: '20000',
  },
});
const { studio } = server;
let deployment: string;

beforeAll(async () => {
  deployment = await studio.deploy(echo());
  await studio.execute({ deployment_name: deployment, query: 'x' });
});

/** Statements that PostgreSQL works on and that read the statistics. */
const reading = async () =>
  (
    await server.database.query(
      `SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND state = 'active'
          AND pid <> pg_backend_pid() AND query LIKE '%rolled_up%' AND query NOT LIKE 'INSERT%'`,
    )
  ).length;
const statistics = (query: string) =>
  studio.json<{ code?: string; execution_count?: number }>(
    `/api/deployments/${deployment}/statistics?${query}`,
  );
/** Since the beginning of a day, some days ago. */
const day = (ago: number) => `from=${new Date(Date.now() - ago * 86_400_000).toISOString().slice(0, 10)}`;

it('statistics that take long leave the connections to executions, are few at once, and refuse what is too much', async () => {
  await server.database.whileLocked('execution_statistics', 'ACCESS EXCLUSIVE', async () => {
    const equal = Array.from({ length: 12 }, () => statistics(day(1)));
    await until(async () => ((await reading()) > 0 ? true : undefined));
    const others = [2, 3, 4, 5, 6, 7].map((index) => statistics(day(index)));
    await until(
      async () => (await studio.metric('agent_studio_slow_statements_waiting')) >= QUEUE || undefined,
    );
    expect(await reading()).toBeLessThanOrEqual(2);
    const refused = await Promise.all([8, 9].map((index) => statistics(day(index))));
    for (const { status, body, headers } of refused) {
      expect({ status, code: body.code }).toEqual({ status: 429, code: 'too_many_requests' });
      expect(Number(headers.get('retry-after'))).toBeGreaterThan(0);
    }
    const runs = Array.from({ length: 20 }, () =>
      studio.execute({ deployment_name: deployment, query: 'x' }),
    );
    expect((await Promise.all(runs)).map(({ status }) => status)).toEqual(runs.map(() => 200));
    // Freed by the end of the lock, in finally of whileLocked.
    pending = [...equal, ...others];
  });
  const answers = await Promise.all(pending);
  expect(answers.slice(0, 12).map(({ status }) => status)).toEqual(Array.from({ length: 12 }, () => 200));
  expect(answers.slice(12).every(({ status }) => status === 200 || status === 429)).toBe(true);
  expect(await studio.metric('agent_studio_refused_slow_requests_total')).toBeGreaterThanOrEqual(2);
  expect((await statistics(day(1))).body.execution_count).toBe(21);
});
let pending: ReturnType<typeof statistics>[] = [];

it('a question that many ask before its answer is there is asked once', async () => {
  const pool = server.app.get(SlowPool);
  const ask = (note: number) =>
    pool.ask<{ at: Date }>({
      text: 'SELECT clock_timestamp() AS at, pg_sleep(0.1), $1::int',
      values: [note],
    });
  const [first, second, other] = await Promise.all([ask(1), ask(1), ask(2)]);
  expect(second).toBe(first);
  expect(other).not.toBe(first);
  expect(await ask(1)).not.toBe(first);
});

it('a statement that takes too long frees its connection, and says why', async () => {
  const impatient = await server.startAnother({
    ROLE: 'api',
    DATABASE_SLOW_TIMEOUT_MS: '3000',
    DATABASE_SLOW_POOL_SIZE: '1',
  });
  try {
    const pool = impatient.app.get(SlowPool);
    const tooLong = pool.ask({ text: 'SELECT pg_sleep($1)', values: [60] });
    await expect(tooLong).rejects.toMatchObject({ code: 'unavailable' });
    expect((await pool.ask({ text: 'SELECT $1::int AS one', values: [1] })).rows).toEqual([{ one: 1 }]);
    await expect(pool.ask({ text: 'SELECT 1 / $1::int', values: [0] })).rejects.toThrow('zero');
    expect((await pool.query({ text: 'SELECT $1::int AS two', values: [2] })).rows).toEqual([{ two: 2 }]);
  } finally {
    await impatient.close();
  }
});

/** How long a statement may take on the connections below. */
const LIMIT_MS = 1500;

it('a transaction whose statement took too long is over, and what comes next on its connection is committed', async () => {
  const source = await createDataSource({
    url: server.database.url,
    poolSize: 1,
    timeoutMs: LIMIT_MS,
  }).initialize();
  try {
    const tooLong = source.transaction((manager) => manager.query('SELECT pg_sleep(10)'));
    await expect(tooLong).rejects.toMatchObject({ code: '57014' });
    expect(isUnavailable(await tooLong.catch((error: unknown) => error))).toBe(true);
    await source.query('CREATE TABLE note (id int)');
    await source.query('INSERT INTO note VALUES (1)');
    expect(await server.database.query('SELECT id FROM note')).toEqual([{ id: 1 }]);
  } finally {
    await source.destroy();
  }
});

it('a connection of a server that does not even end its statements is given up', async () => {
  const client = new StrictClient({ connectionString: server.database.url, query_timeout: LIMIT_MS });
  const ended = new Promise((resolve) => client.once('end', resolve));
  client.on('error', () => undefined);
  await client.connect();
  await expect(client.query('SELECT pg_sleep(10)')).rejects.toThrow('Query read timeout');
  await ended;
});

it('a long statement has its own limit, and leaves the connection with the usual one', async () => {
  const pool = new Pool({ connectionString: server.database.url, max: 1, ...timeLimits(LIMIT_MS) });
  try {
    await queryAtLength(pool, { text: 'SELECT pg_sleep($1)', values: [2] });
    await expect(pool.query('SELECT pg_sleep(10)')).rejects.toMatchObject({ code: '57014' });
    await expect(queryAtLength(pool, { text: 'SELECT 1 / $1::int', values: [0] })).rejects.toThrow('zero');
    await expect(pool.query('SELECT pg_sleep(10)')).rejects.toMatchObject({ code: '57014' });
  } finally {
    await pool.end();
  }
});

import { afterAll, beforeAll, expect, it } from '@jest/globals';
import { SlowPool } from '../../src/database/slow-pool.js';
import { startTestApp } from '../support/app.js';
import type { TestApp } from '../support/app.js';
import { Studio, echo, until } from '../support/studio.js';

const QUEUE = 5;

let server: TestApp;
let studio: Studio;
let deployment: string;

beforeAll(async () => {
  server = await startTestApp({
    DATABASE_SLOW_POOL_SIZE: '2',
    DATABASE_SLOW_QUEUE: String(QUEUE),
    DATABASE_SLOW_TIMEOUT_MS: '60000',
    DATABASE_TIMEOUT_MS: '20000',
  });
  studio = new Studio(server.url);
  deployment = await studio.deploy(echo());
  await studio.execute({ deployment_name: deployment, query: 'x' });
});
afterAll(() => server.close());

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
const day = (index: number) => `from=2026-11-0${index}`;

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
  const impatient = await startTestApp(
    { ROLE: 'api', DATABASE_SLOW_TIMEOUT_MS: '1000', DATABASE_SLOW_POOL_SIZE: '1' },
    server.database,
  );
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

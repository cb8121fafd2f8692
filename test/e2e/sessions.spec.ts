import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { Client } from 'pg';
import { DataSource } from 'typeorm';
import { startTestApp } from '../support/app.js';
import type { TestApp } from '../support/app.js';
import { createTestDatabase, runStatement } from '../support/database.js';
import type { TestDatabase } from '../support/database.js';
import { itInFull } from '../support/effort.js';
import { Studio, echo, faultsOfStream, until } from '../support/studio.js';

/** What an administrator may have given to a database. Each of them has broken a statement, or would. */
const FOREIGN = {
  DateStyle: "'German'",
  IntervalStyle: "'sql_standard'",
  TimeZone: "'Pacific/Chatham'",
  search_path: 'elsewhere',
  bytea_output: "'escape'",
  extra_float_digits: '-15',
  standard_conforming_strings: 'off',
  array_nulls: 'off',
  transform_null_equals: 'on',
  default_transaction_isolation: "'serializable'",
  default_transaction_read_only: 'on',
  default_transaction_deferrable: 'on',
  statement_timeout: "'1ms'",
  lock_timeout: "'1ms'",
  idle_session_timeout: "'50ms'",
  idle_in_transaction_session_timeout: "'1ms'",
};

interface Ended {
  status: string;
  created_at: string;
  started_at: string;
  finished_at: string;
  duration_ms: number;
}

/** Changes the database itself, on a connection that its settings do not concern. */
async function configure(database: TestDatabase, settings: Record<string, string>): Promise<void> {
  const { pathname } = new URL(database.url);
  for (const [name, value] of Object.entries(settings))
    await runStatement(
      process.env.TEST_DATABASE_URL ?? '',
      `ALTER DATABASE ${pathname.slice(1)} SET ${name} = ${value}`,
    );
}

describe('a database with settings of its own', () => {
  let database: TestDatabase;

  beforeAll(async () => {
    database = await createTestDatabase();
    await database.query(
      'CREATE SCHEMA elsewhere CREATE TABLE execution (nothing text) CREATE TABLE migrations (nothing text)',
    );
    await configure(database, FOREIGN);
  });
  afterAll(() => database.drop());

  it.each(['at its first start', 'at its next'])('serves as every other, %s', async () => {
    const server = await startTestApp({}, database);
    try {
      const studio = new Studio(server.url);
      const before = Date.now();
      const deployment_name = await studio.deploy(echo());
      const stream = await studio.stream({ deployment_name, query: 'Hello' });
      expect(faultsOfStream(await stream.frames(), stream.executionId)).toEqual([]);
      const { body } = await studio.json<Ended>(`/api/executions/${stream.executionId}`);
      expect(body.status).toBe('completed');
      for (const time of [body.created_at, body.started_at, body.finished_at]) {
        expect(Date.parse(time)).toBeGreaterThanOrEqual(before - 1000);
        expect(Date.parse(time)).toBeLessThanOrEqual(Date.now() + 1000);
      }
      expect(body.duration_ms).toBeGreaterThanOrEqual(0);
      const statistics = await studio.json<object>(`/api/deployments/${deployment_name}/statistics`);
      expect(statistics).toMatchObject({ status: 200, body: { success_count: 1 } });
      expect((await studio.execute({ deployment_name, query: 'again' })).status).toBe(200);
    } finally {
      await server.close();
    }
  });

  it('and every connection of the server has the ones that it was written for', async () => {
    const server = await startTestApp({}, database);
    try {
      const { rows } = await server.app
        .get(DataSource)
        .query('SELECT 1')
        .then(() => ownSettings(server));
      expect(rows).toEqual([]);
    } finally {
      await server.close();
    }
  });

  /** Settings that a connection of the resources took from the database. */
  async function ownSettings(server: TestApp) {
    const rows = await server.app
      .get(DataSource)
      .query<object[]>(
        `SELECT name, setting FROM pg_settings WHERE source IN ('database', 'user', 'database user')`,
      );
    return { rows };
  }
});

describe('a search_path with which the tables were made', () => {
  itInFull('is asked for in words, and no second set of tables is made', async () => {
    const database = await createTestDatabase();
    try {
      await (await startTestApp({}, database)).close();
      await database.query('ALTER SCHEMA public RENAME TO studio');
      await database.query('CREATE SCHEMA public');
      await configure(database, { search_path: 'studio' });
      await expect(startTestApp({}, database)).rejects.toThrow('?options=-c%20search_path%3Dstudio');
      const url = new URL(database.url);
      url.searchParams.set('options', '-c search_path=studio');
      const server = await startTestApp({}, { ...database, url: url.href });
      const studio = new Studio(server.url);
      const deployment_name = await studio.deploy(echo());
      expect((await studio.execute({ deployment_name, query: 'x' })).status).toBe(200);
      await server.close();
    } finally {
      await database.drop();
    }
  });
});

describe('a process that is cut off inside of a transaction', () => {
  itInFull('holds its locks for some seconds, and others go on', async () => {
    const server = await startTestApp();
    try {
      const studio = new Studio(server.url);
      const deployment_name = await studio.deploy(echo());
      const runner = server.app.get(DataSource).createQueryRunner();
      const client = (await runner.connect()) as Client;
      client.on('error', () => undefined); // that it is ended is what this is about
      await runner.startTransaction();
      await runner.query('SELECT * FROM deployment FOR UPDATE');
      const answer = studio.execute<{ status: string }>({ deployment_name, query: 'x' });
      await until(async () => {
        const [row] = await server.database.query<{ open: boolean }>(
          `SELECT count(*) > 0 AS open FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'`,
        );
        return row?.open === false;
      });
      expect((await answer).status).toBe(200);
      await runner.release().catch(() => undefined);
    } finally {
      await server.close();
    }
  });
});

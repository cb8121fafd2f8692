import { afterAll, beforeAll, expect, it } from '@jest/globals';
import { Pool } from 'pg';
import { createDataSource } from '../../src/database/data-source.js';
import { queryAtLength } from '../../src/database/query-at-length.js';
import { StrictClient, timeLimits } from '../../src/database/strict-client.js';
import { isUnavailable } from '../../src/database/unavailable.js';
import { createTestDatabase } from '../support/database.js';
import type { TestDatabase } from '../support/database.js';

const LIMIT_MS = 300;

let database: TestDatabase;
beforeAll(async () => {
  database = await createTestDatabase();
  await database.query('CREATE TABLE note (id int)');
});
afterAll(() => database.drop());

it('a transaction whose statement took too long is over, and what comes next on its connection is committed', async () => {
  const source = await createDataSource({ url: database.url, poolSize: 1, timeoutMs: LIMIT_MS }).initialize();
  try {
    const tooLong = source.transaction((manager) => manager.query('SELECT pg_sleep(10)'));
    await expect(tooLong).rejects.toMatchObject({ code: '57014' });
    expect(isUnavailable(await tooLong.catch((error: unknown) => error))).toBe(true);
    await source.query('INSERT INTO note VALUES (1)');
    expect(await database.query('SELECT id FROM note')).toEqual([{ id: 1 }]);
  } finally {
    await source.destroy();
  }
});

it('a connection of a server that does not even end its statements is given up', async () => {
  const client = new StrictClient({ connectionString: database.url, query_timeout: LIMIT_MS });
  const ended = new Promise((resolve) => client.once('end', resolve));
  client.on('error', () => undefined);
  await client.connect();
  await expect(client.query('SELECT pg_sleep(10)')).rejects.toThrow('Query read timeout');
  await ended;
});

it('a long statement has its own limit, and leaves the connection with the usual one', async () => {
  const pool = new Pool({ connectionString: database.url, max: 1, ...timeLimits(LIMIT_MS) });
  try {
    await queryAtLength(pool, { text: 'SELECT pg_sleep($1)', values: [1] });
    await expect(pool.query('SELECT pg_sleep(10)')).rejects.toMatchObject({ code: '57014' });
    await expect(queryAtLength(pool, { text: 'SELECT 1 / $1::int', values: [0] })).rejects.toThrow('zero');
    await expect(pool.query('SELECT pg_sleep(10)')).rejects.toMatchObject({ code: '57014' });
  } finally {
    await pool.end();
  }
});

import { randomUUID } from 'node:crypto';
import { Client } from 'pg';

export interface TestDatabase {
  url: string;
  query<Row extends object>(text: string, values?: unknown[]): Promise<Row[]>;
  /** Holds up every statement that conflicts with this lock while `work` is done. */
  whileLocked(table: string, mode: 'SHARE' | 'ACCESS EXCLUSIVE', work: () => Promise<void>): Promise<void>;
  drop(): Promise<void>;
}

/** A database of its own on the run's PostgreSQL. */
export async function createTestDatabase(): Promise<TestDatabase> {
  const serverUrl = process.env.TEST_DATABASE_URL;
  if (!serverUrl)
    throw new Error(
      'TEST_DATABASE_URL is set by test/support/global-setup.mjs; run the tests with jest.config.js.',
    );
  const name = `test_${randomUUID().replaceAll('-', '')}`;
  await runStatement(serverUrl, `CREATE DATABASE ${name}`);
  const url = new URL(serverUrl);
  url.pathname = `/${name}`;
  return {
    url: url.href,
    query: (text, values) => runStatement(url.href, text, values),
    whileLocked: (table, mode, work) => whileLocked(url.href, `LOCK TABLE ${table} IN ${mode} MODE`, work),
    drop: async () => void (await runStatement(serverUrl, `DROP DATABASE ${name} WITH (FORCE)`)),
  };
}

/** One statement on a connection of its own. */
export async function runStatement<Row extends object>(
  connectionString: string,
  text: string,
  values?: unknown[],
): Promise<Row[]> {
  const client = new Client({ connectionString });
  await client.connect();
  try {
    return (await client.query<Row>(text, values)).rows;
  } finally {
    await client.end();
  }
}

/** Runs a `LOCK TABLE` statement, and holds the lock while `work` is done. */
export async function whileLocked(
  connectionString: string,
  statement: string,
  work: () => Promise<void>,
): Promise<void> {
  const client = new Client({ connectionString });
  await client.connect();
  try {
    await client.query('BEGIN');
    await client.query(statement);
    await work();
  } finally {
    await client.end();
  }
}

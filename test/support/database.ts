import { randomUUID } from 'node:crypto';
import { Client } from 'pg';

export interface TestDatabase {
  url: string;
  query<Row extends object>(text: string, values?: unknown[]): Promise<Row[]>;
  /** Holds up every statement that conflicts with this lock while `work` is done. */
  whileLocked(table: string, mode: 'SHARE' | 'ACCESS EXCLUSIVE', work: () => Promise<void>): Promise<void>;
  drop(): Promise<void>;
}

/** A {@link TestDatabase} that is not made yet. */
export interface NewTestDatabase extends TestDatabase {
  create(): Promise<void>;
}

/** An empty database of its own on the run's PostgreSQL. */
export async function createTestDatabase(): Promise<TestDatabase> {
  const database = newDatabase('');
  await database.create();
  return database;
}

/** One with the schema, as a server has left it that was started on it and stopped. */
export async function createMigratedDatabase(): Promise<TestDatabase> {
  const database = newMigratedDatabase();
  await database.create();
  return database;
}

export function newMigratedDatabase(): NewTestDatabase {
  return newDatabase(`TEMPLATE ${variable('TEST_DATABASE_TEMPLATE')}`);
}

function newDatabase(options: string): NewTestDatabase {
  const serverUrl = variable('TEST_DATABASE_URL');
  const name = `test_${randomUUID().replaceAll('-', '')}`;
  const url = new URL(serverUrl);
  url.pathname = `/${name}`;
  return {
    url: url.href,
    create: async () => void (await runStatement(serverUrl, `CREATE DATABASE ${name} ${options}`)),
    query: (text, values) => runStatement(url.href, text, values),
    whileLocked: (table, mode, work) => whileLocked(url.href, `LOCK TABLE ${table} IN ${mode} MODE`, work),
    drop: async () => void (await runStatement(serverUrl, `DROP DATABASE ${name} WITH (FORCE)`)),
  };
}

function variable(name: string): string {
  const value = process.env[name];
  if (value) return value;
  throw new Error(`${name} is set by test/support/global-setup.mjs; run the tests with jest.config.js.`);
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

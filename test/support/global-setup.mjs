import { randomUUID } from 'node:crypto';
import { readdirSync, statSync } from 'node:fs';
import { mkdtemp } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Client } from 'pg';

const SOURCE = new URL('../../src/', import.meta.url);
const BUILT = new URL('../../dist/', import.meta.url);

/** Its data is thrown away, so nothing of it needs to survive a loss of power. */
const SERVER_OPTIONS = { max_connections: '500', fsync: 'off', full_page_writes: 'off' };

/**
 * Starts one real PostgreSQL for the whole run, or takes the one of `TEST_DATABASE_URL`, and makes on it the database of which
 * each test file's own is a copy: `TEST_DATABASE_TEMPLATE`.
 */
export default async function globalSetup() {
  requireFreshBuild();
  globalThis.testPostgres = {};
  process.env.TEST_DATABASE_URL ??= await startPostgres();
  process.env.TEST_DATABASE_TEMPLATE = await createTemplate(process.env.TEST_DATABASE_URL);
}

async function startPostgres() {
  const { startEmbeddedPostgres } = await importBuilt('database/embedded-postgres.js');
  const dataDir = await mkdtemp(join(tmpdir(), 'agent-studio-test-'));
  const server = await startEmbeddedPostgres({ dataDir, log: () => {}, serverOptions: SERVER_OPTIONS });
  Object.assign(globalThis.testPostgres, { server, dataDir });
  return server.url;
}

/** A start of the server makes the schema, its own and that of its queue. */
async function createTemplate(serverUrl) {
  const { createApp } = await importBuilt('app.js');
  const { loadConfig } = await importBuilt('config.js');
  const name = `test_template_${randomUUID().replaceAll('-', '')}`;
  const url = new URL(serverUrl);
  url.pathname = `/${name}`;
  await runStatement(serverUrl, `CREATE DATABASE ${name}`);
  const config = loadConfig({ LOG_LEVEL: 'error', DATABASE_URL: url.href });
  const app = await createApp({ ...config, DATABASE_URL: url.href });
  await app.close();
  globalThis.testPostgres.dropTemplate = () => runStatement(serverUrl, `DROP DATABASE ${name} WITH (FORCE)`);
  return name;
}

async function runStatement(connectionString, text) {
  const client = new Client({ connectionString });
  await client.connect();
  try {
    await client.query(text);
  } finally {
    await client.end();
  }
}

/** Tests of a server that is not the one of the sources would show nothing. */
function requireFreshBuild() {
  const built = statSync(new URL('main.js', BUILT), { throwIfNoEntry: false })?.mtimeMs ?? 0;
  const newer = readdirSync(SOURCE, { recursive: true }).find(
    (name) => name.endsWith('.ts') && statSync(new URL(name, SOURCE)).mtimeMs > built,
  );
  if (newer) throw new Error(`src/${newer} is newer than the built server, which is tested: npm run build`);
}

function importBuilt(module) {
  return import(new URL(module, BUILT).href);
}

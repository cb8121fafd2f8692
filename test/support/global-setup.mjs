import { mkdtemp } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

/**
 * Starts one real PostgreSQL for the whole run, or takes the one of `TEST_DATABASE_URL`; each test file makes its own
 * database on it. Jest does not map module names here, so it is the built code that is imported.
 */
export default async function globalSetup() {
  if (process.env.TEST_DATABASE_URL) return;
  const { startEmbeddedPostgres } = await import('../../dist/database/embedded-postgres.js').catch(
    (cause) => {
      throw new Error('The tests start the built PostgreSQL module: run `npm run build` first.', { cause });
    },
  );
  const dataDir = await mkdtemp(join(tmpdir(), 'agent-studio-test-'));
  const server = await startEmbeddedPostgres({
    dataDir,
    log: () => {},
    serverOptions: { max_connections: '500' },
  });
  globalThis.testPostgres = { server, dataDir };
  process.env.TEST_DATABASE_URL = server.url;
}

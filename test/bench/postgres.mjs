// The PostgreSQL that Agent Studio runs on: one of its own in a temporary folder, or a server that is given. Each server
// of Agent Studio gets a new database there.
import { randomUUID } from 'node:crypto';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { Client } from 'pg';
import { postmasterOf } from './processes.mjs';

/**
 * @param options.dist folder of the built server
 * @param options.folder where the data of an own server goes
 * @param options.serverUrl a server to use in place of an own one
 * @returns `{url, postmaster, note, end()}`; `postmaster`: process id of the server, undefined if it is not on this
 *   machine; `note` says what a reader of the figures must know
 */
export async function startPostgres({ dist, folder, serverUrl }) {
  if (serverUrl === undefined) return startOwn(dist, folder);
  return {
    url: serverUrl,
    postmaster: await findPostmaster(serverUrl),
    note: 'PostgreSQL is the server of BENCH_DATABASE_URL, not pinned; its CPU counts what others do there, too',
    end: async () => {},
  };
}

/** Creates a database on the server: `{url, end()}`. */
export async function createDatabase(serverUrl) {
  const name = `benchmark_${randomUUID().replaceAll('-', '')}`;
  await query(serverUrl, `CREATE DATABASE ${name}`);
  const url = new URL(serverUrl);
  url.pathname = `/${name}`;
  return { url: url.href, end: () => query(serverUrl, `DROP DATABASE IF EXISTS ${name} WITH (FORCE)`) };
}

async function startOwn(dist, folder) {
  const file = pathToFileURL(join(dist, 'database/embedded-postgres.js'));
  const { startEmbeddedPostgres } = await import(file).catch((error) => {
    throw new Error(`There is no build of Agent Studio in ${dist}. Make one with "npm run build".`, {
      cause: error,
    });
  });
  // Its processes run where this one is pinned to.
  const server = await startEmbeddedPostgres({ dataDir: folder, log: console.error });
  return { url: server.url, postmaster: await findPostmaster(server.url), end: () => server.stop() };
}

function findPostmaster(url) {
  return query(url, 'SELECT pg_backend_pid() AS pid', ([{ pid }]) => postmasterOf(pid));
}

/** @param whileOpen makes the result of the rows before the connection and its backend end */
async function query(connectionString, text, whileOpen = (rows) => rows) {
  const client = new Client({ connectionString });
  await client.connect();
  try {
    return whileOpen((await client.query(text)).rows);
  } finally {
    await client.end();
  }
}

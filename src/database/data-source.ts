import { Client } from 'pg';
import { DataSource } from 'typeorm';
import { BatchOrder } from './entities/batch-order.entity.js';
import { Batch } from './entities/batch.entity.js';
import { CounterDelta } from './entities/counter-delta.entity.js';
import { DeploymentRevision } from './entities/deployment-revision.entity.js';
import { Deployment } from './entities/deployment.entity.js';
import { ExecutionChunk } from './entities/execution-chunk.entity.js';
import { Execution } from './entities/execution.entity.js';
import { ExecutionStatistics } from './entities/execution-statistics.entity.js';
import { ExecutionSubscriber } from './entities/execution-subscriber.entity.js';
import { ServerProcess } from './entities/server-process.entity.js';
import { StatisticsBackfill } from './entities/statistics-backfill.entity.js';
import { StatusEvent } from './entities/status-event.entity.js';
import { Step } from './entities/step.entity.js';
import { WorkerLease } from './entities/worker-lease.entity.js';
import { Workflow } from './entities/workflow.entity.js';
import { CONNECT_TIMEOUT_MS, sessionConfig } from './session.js';
import { StrictClient } from './strict-client.js';
import { migrations } from './migrations/index.js';
import { LOCKS } from './locks.js';

/** ms that a migration may be silent inside of its transaction: it is the only thing that its process does. */
const IDLE_IN_MIGRATION_MS = 60_000;

export interface DatabaseOptions {
  /** `postgres://` URL. */
  url: string;
  /** Connections of the pool at most. */
  poolSize?: number;
  /** ms that a statement may take; without it, as long as it likes. */
  timeoutMs?: number;
}

/** The one description of the database: the app and the migration CLI both use it. It never synchronizes. */
export function createDataSource({ url, poolSize = 10, timeoutMs }: DatabaseOptions): DataSource {
  const { connectionString, ...session } = sessionConfig(url, {
    kind: timeoutMs === undefined ? 'migration' : 'resources',
    statementMs: timeoutMs,
    idleInTransactionMs: timeoutMs === undefined ? IDLE_IN_MIGRATION_MS : undefined,
  });
  return new DataSource({
    type: 'postgres',
    url: connectionString,
    entities: [
      WorkerLease,
      Workflow,
      Deployment,
      DeploymentRevision,
      Execution,
      Batch,
      BatchOrder,
      Step,
      ExecutionChunk,
      ExecutionSubscriber,
      ServerProcess,
      StatusEvent,
      CounterDelta,
      ExecutionStatistics,
      StatisticsBackfill,
    ],
    migrations,
    migrationsTransactionMode: 'each',
    synchronize: false,
    uuidExtension: 'pgcrypto',
    installExtensions: false,
    poolSize,
    connectTimeoutMS: CONNECT_TIMEOUT_MS,
    extra: { ...session, Client: StrictClient },
  });
}

/**
 * Brings the schema up to date, however long that takes. Processes that start at the same moment wait for each other on an
 * advisory lock. Rejects with a remedy if the tables of an earlier start are where nobody looks for them.
 */
export async function migrate(url: string): Promise<void> {
  const dataSource = await createDataSource({ url }).initialize();
  const lock = new Client(sessionConfig(url, { kind: 'migration' }));
  lock.on('error', () => undefined); // the statement after it says so
  try {
    await lock.connect();
    await lock.query('SELECT pg_advisory_lock($1)', [LOCKS.migration]);
    await refuseOtherSchema(lock, url);
    await dataSource.runMigrations();
  } finally {
    await lock.end();
    await dataSource.destroy();
  }
}

/** The role or the database may have a `search_path` of their own, with which the tables were once made elsewhere. */
async function refuseOtherSchema(client: Client, url: string): Promise<void> {
  const find = `SELECT relnamespace::regnamespace AS schema FROM pg_class WHERE oid = to_regclass('execution_chunk')`;
  const { rowCount } = await client.query(find);
  if (rowCount === 1) return;
  const other = new Client(sessionConfig(url, { kind: 'migration', foreignPath: true }));
  other.on('error', () => undefined); // as above
  try {
    await other.connect();
    const { rows } = await other.query<{ schema: string }>(find);
    const [found] = rows;
    if (!found) return;
    throw new Error(
      `The tables are in the schema ${found.schema}, by a search_path that the role or the database has. ` +
        `The server goes by its own: say it in DATABASE_URL, with ?options=-c%20search_path%3D${found.schema}`,
    );
  } finally {
    await other.end();
  }
}

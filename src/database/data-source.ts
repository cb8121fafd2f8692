import { Client } from 'pg';
import { DataSource } from 'typeorm';
import { BatchOrder } from './entities/batch-order.entity.js';
import { Batch } from './entities/batch.entity.js';
import { DeploymentRevision } from './entities/deployment-revision.entity.js';
import { Deployment } from './entities/deployment.entity.js';
import { ExecutionChunk } from './entities/execution-chunk.entity.js';
import { Execution } from './entities/execution.entity.js';
import { ExecutionSubscriber } from './entities/execution-subscriber.entity.js';
import { ServerProcess } from './entities/server-process.entity.js';
import { StatusEvent } from './entities/status-event.entity.js';
import { Step } from './entities/step.entity.js';
import { Workflow } from './entities/workflow.entity.js';
import { StrictClient, timeLimits } from './strict-client.js';
import { migrations } from './migrations/index.js';
import { LOCKS } from './locks.js';

/** ms until an unreachable server counts as away. */
export const CONNECT_TIMEOUT_MS = 4000;

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
  return new DataSource({
    type: 'postgres',
    url,
    applicationName: 'agent-studio',
    entities: [
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
    ],
    migrations,
    migrationsTransactionMode: 'each',
    synchronize: false,
    uuidExtension: 'pgcrypto',
    installExtensions: false,
    poolSize,
    connectTimeoutMS: CONNECT_TIMEOUT_MS,
    extra: {
      Client: StrictClient,
      keepAlive: true,
      ...(timeoutMs === undefined ? {} : timeLimits(timeoutMs)),
    },
  });
}

/** Brings the schema up to date, however long that takes. Processes that start at the same moment wait for each other on an advisory lock. */
export async function migrate(url: string): Promise<void> {
  const dataSource = await createDataSource({ url }).initialize();
  const lock = new Client({ connectionString: url, connectionTimeoutMillis: CONNECT_TIMEOUT_MS });
  lock.on('error', () => undefined); // the statement after it says so
  try {
    await lock.connect();
    await lock.query('SELECT pg_advisory_lock($1)', [LOCKS.migration]);
    await dataSource.runMigrations();
  } finally {
    await lock.end();
    await dataSource.destroy();
  }
}

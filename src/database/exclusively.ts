import type { Pool, PoolClient } from 'pg';
import { withClient } from './with-client.js';
import type { AdvisoryLock } from './locks.js';

/**
 * Runs `work` in a transaction that one process at a time is in: each statement of it sees what the one before committed.
 * A process that is stopped inside of it is cut off by PostgreSQL after 2 s. Rejects as `work` and pg do, also when the
 * lock was not to be had for 3 s.
 */
export function exclusively<Result>(
  pool: Pool,
  lock: AdvisoryLock,
  work: (client: PoolClient) => Promise<Result>,
): Promise<Result> {
  return withClient(pool, async (client) => {
    await client.query(`
      BEGIN;
      SET LOCAL lock_timeout = '3s';
      SET LOCAL idle_in_transaction_session_timeout = '2s';
      SELECT pg_advisory_xact_lock(${lock})`);
    const result = await work(client);
    await client.query('COMMIT');
    return result;
  });
}

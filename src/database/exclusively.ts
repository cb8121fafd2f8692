import type { Pool, PoolClient } from 'pg';

/**
 * Runs `work` in a transaction that one process at a time is in: each statement of it sees what the one before committed.
 * A process that is stopped inside of it is cut off by PostgreSQL after 2 s. Rejects as `work` and pg do, also when the
 * lock was not to be had for 3 s.
 *
 * @param lock any number that no other program on the same database uses for its advisory locks
 */
export async function exclusively<Result>(
  pool: Pool,
  lock: number,
  work: (client: PoolClient) => Promise<Result>,
): Promise<Result> {
  const client = await pool.connect();
  let failure: Error | undefined;
  const onError = (error: Error) => (failure = error); // PostgreSQL ended it between two statements
  client.on('error', onError);
  try {
    await client.query(`
      BEGIN;
      SET LOCAL lock_timeout = '3s';
      SET LOCAL idle_in_transaction_session_timeout = '2s';
      SELECT pg_advisory_xact_lock(${lock})`);
    const result = await work(client);
    await client.query('COMMIT');
    return result;
  } catch (error) {
    failure = error instanceof Error ? error : new Error(String(error));
    throw error;
  } finally {
    client.off('error', onError);
    client.release(failure); // a connection with a broken transaction is not used again
  }
}

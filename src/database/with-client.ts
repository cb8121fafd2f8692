import type { Pool, PoolClient } from 'pg';

/**
 * Gives `work` a connection of its own. One on which anything failed is not used again: its transaction may be broken, or its
 * settings not be reset. Rejects as `work` and pg do.
 */
export async function withClient<Result>(
  pool: Pool,
  work: (client: PoolClient) => Promise<Result>,
): Promise<Result> {
  const client = await pool.connect();
  let failure: Error | undefined;
  const onError = (error: Error) => (failure = error); // PostgreSQL ended it between two statements
  client.on('error', onError);
  try {
    return await work(client);
  } catch (error) {
    failure = error instanceof Error ? error : new Error(String(error));
    throw error;
  } finally {
    client.off('error', onError);
    client.release(failure);
  }
}

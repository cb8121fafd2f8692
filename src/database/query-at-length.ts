import type { Pool, QueryResult, QueryResultRow } from 'pg';

/** ms that a statement may take which reads or deletes much at once. */
const LONG_MS = 60_000;

/** A statement that may take a minute, where the pool's connections are less patient. Rejects as pg does. */
export async function queryAtLength<Row extends QueryResultRow>(
  pool: Pool,
  { text, values }: { text: string; values: unknown[] },
): Promise<QueryResult<Row>> {
  const client = await pool.connect();
  let failure: Error | undefined;
  const onError = (error: Error) => (failure = error); // PostgreSQL ended it between two statements
  client.on('error', onError);
  try {
    await client.query(`SET statement_timeout = ${LONG_MS}`);
    const statement = { text, values, query_timeout: LONG_MS + 1000 };
    const result = await client.query<Row>(statement);
    await client.query('RESET statement_timeout');
    return result;
  } catch (error) {
    failure = error instanceof Error ? error : new Error(String(error));
    throw error;
  } finally {
    client.off('error', onError);
    client.release(failure); // its limit may not have been reset
  }
}

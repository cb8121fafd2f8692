import type { Pool, QueryResult, QueryResultRow } from 'pg';
import { withClient } from './with-client.js';

/** ms that a statement may take which reads or deletes much at once. */
const LONG_MS = 60_000;

/** A statement that may take a minute, where the pool's connections are less patient. Rejects as pg does. */
export function queryAtLength<Row extends QueryResultRow>(
  pool: Pool,
  { text, values }: { text: string; values: unknown[] },
): Promise<QueryResult<Row>> {
  return withClient(pool, async (client) => {
    await client.query(`SET statement_timeout = ${LONG_MS}`);
    const statement = { text, values, query_timeout: LONG_MS + 1000 };
    const result = await client.query<Row>(statement);
    await client.query('RESET statement_timeout');
    return result;
  });
}

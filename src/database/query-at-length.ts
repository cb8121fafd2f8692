import type { Pool, QueryResult, QueryResultRow } from 'pg';
import { MOST_BYTES } from './group-commit.js';
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

/** A statement that may take a minute if its text parameters are long together, as with one item that is too large for any group. */
export function queryLarge<Row extends QueryResultRow>(
  pool: Pool,
  { name, text, values }: { name: string; text: string; values: unknown[] },
): Promise<QueryResult<Row>> {
  const length = values.reduce(
    (sum: number, value) => sum + (typeof value === 'string' || Buffer.isBuffer(value) ? value.length : 0),
    0,
  );
  return length > MOST_BYTES
    ? queryAtLength<Row>(pool, { text, values })
    : pool.query<Row>({ name, text, values });
}

import type { Pool, PoolClient } from 'pg';
import { APPLICATION_NAME } from '../database/session.js';
import { withClient } from '../database/with-client.js';
import { orderRowOf, partsOf } from './merged-order.js';
import type { OrderRow, Range, StoredRow } from './merged-order.js';
import { POSITIONS } from './statements.js';

/** Nobody appends to any order until the transaction ends, older builds included: they ask for no other lock. */
const BEGIN = `
  BEGIN;
  SET LOCAL lock_timeout = '3s';
  SET LOCAL idle_in_transaction_session_timeout = '2s';
  LOCK TABLE batch_order IN SHARE ROW EXCLUSIVE MODE`;

/** The lock keeps retention from it. */
const CUTS = 'SELECT order_cuts FROM batch WHERE batch_id = $1 AND log_deleted_at IS NULL FOR NO KEY UPDATE';

/** The first row with a range that a log does not hold; $2 is how far the members' logs go. */
const FIRST_IMPOSSIBLE = `
  SELECT first_position, last_position, parts FROM batch_order
   WHERE batch_id = $1
     AND EXISTS (SELECT 1 FROM string_to_table(parts, ',') AS part
                  WHERE split_part(part, '-', 2)::int > ($2::int[])[split_part(part, ':', 1)::int + 1])
   ORDER BY first_position LIMIT 1`;

/** The row that begins at $2 ends earlier. */
const SHORTEN = `
  UPDATE batch_order SET last_position = $3, parts = $4, merged = NULL WHERE batch_id = $1 AND first_position = $2`;
const DELETE_AFTER = 'DELETE FROM batch_order WHERE batch_id = $1 AND last_position > $2';
const COUNT_CUT = 'UPDATE batch SET order_cuts = order_cuts + 1 WHERE batch_id = $1';

/**
 * Processes of older builds don't look whether an order was cut. But what they know of it they know by the connection over which
 * they append: when that ends, they begin anew. They have it under another name than this build, or under none of its own.
 */
const END_OLDER = `
  SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity
   WHERE datname = current_database() AND usename = current_user AND pid <> pg_backend_pid()
     AND (application_name = '${APPLICATION_NAME}/merged-log'
          OR application_name = '${APPLICATION_NAME}' AND query ~ '^\\s*(INSERT INTO batch_order|SET synchronous_commit)')`;

/**
 * Cuts the stored order of a batch where it holds, for the first time, what the log of a member does not: older builds stored what
 * they had heard, and no reader gets past such a place. Whoever merges the batch has to begin anew.
 *
 * @param known members, and how often the order had been cut when it was found to be impossible
 * @returns the last position that is left; undefined if another process was faster
 */
export async function cutOrder(
  pool: Pool,
  batchId: string,
  known: { members: string[]; cuts: number },
): Promise<number | undefined> {
  return withClient(pool, async (client) => {
    await client.query(BEGIN);
    const cuts = await client.query<{ order_cuts: number }>(CUTS, [batchId]);
    const position = await cutFirst(client, batchId, known.members);
    if (position === undefined && cuts.rows[0]?.order_cuts === known.cuts)
      throw new Error(`The order of batch ${batchId} goes beyond its logs, and no row of it does.`);
    await client.query('COMMIT');
    // Who connected meanwhile may have read what was there before.
    if (position !== undefined) await client.query(END_OLDER);
    return position;
  });
}

async function cutFirst(client: PoolClient, batchId: string, members: string[]): Promise<number | undefined> {
  const logs = await client.query<{ execution_id: string; last_sequence: number }>({
    ...POSITIONS,
    values: [members],
  });
  const found = new Map(logs.rows.map((row) => [row.execution_id, row.last_sequence]));
  const lasts = members.map((executionId) => found.get(executionId) ?? 0);
  const { rows } = await client.query<StoredRow>(FIRST_IMPOSSIBLE, [batchId, lasts]);
  if (!rows[0]) return undefined;
  const row = possibleOf(orderRowOf(rows[0]), lasts);
  const { first_position: first, last_position: last, ranges } = row;
  await client.query(END_OLDER);
  if (ranges.length > 0) await client.query(SHORTEN, [batchId, first, last, partsOf(ranges)]);
  await client.query(DELETE_AFTER, [batchId, last]);
  await client.query(COUNT_CUT, [batchId]);
  return last;
}

/** What comes before the first chunk that a log does not hold. */
function possibleOf({ first_position, ranges }: OrderRow, lasts: number[]): OrderRow {
  const possible: Range[] = [];
  let position = first_position - 1;
  for (const { member, first, last } of ranges) {
    const held = Math.min(last, lasts[member] ?? 0);
    if (held >= first) {
      possible.push({ member, first, last: held });
      position += held - first + 1;
    }
    if (held < last) break;
  }
  return { first_position, last_position: position, ranges: possible };
}

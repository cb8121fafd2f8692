import type { Pool } from 'pg';
import type { SessionConnection } from '../database/session-connection.js';
import { lastOf, unseen } from './statements.js';

/** Consecutive chunks of one member: 0 is the batch itself, the others are its items in their order. */
export interface Range {
  member: number;
  first: number;
  last: number;
}

/** A stored piece of the order. */
export interface OrderRow {
  first_position: number;
  last_position: number;
  ranges: Range[];
}

/** The batch's own log has two chunks: `started`, and this one, which is the last of all. */
export const LAST_OF_BATCH = 2;
/** The end is a row of its own, so that it can be told at a glance. It is never deleted. */
export const END_PARTS = `0:${LAST_OF_BATCH}-${LAST_OF_BATCH}`;

/**
 * Whoever inserts the row that begins at a position decides what comes there, so that processes need no lock between them.
 * The others find it taken, and read it. It must follow the row before it: a crash of PostgreSQL can take the last rows away.
 * And the logs must hold its ranges, whatever was heard of them: a reader would wait for the chunks of any other for ever.
 * Batches are in the order of their ids, so that two processes can't wait for each other.
 */
const APPEND = {
  name: 'batch-order-append',
  text: `
    WITH unwritten AS MATERIALIZED (
      SELECT number FROM unnest(${unseen('$6::int[]')}, ${unseen('$7::uuid[]')}, ${unseen('$8::int[]')})
                           AS range (number, execution_id, last)
       WHERE range.last > ${lastOf('range.execution_id')})
    INSERT INTO batch_order (batch_id, first_position, last_position, parts, merged)
    SELECT batch_id, first_position, last_position, parts, merged::int[]
      FROM unnest(${unseen('$1::uuid[]')}, ${unseen('$2::int[]')}, ${unseen('$3::int[]')}, ${unseen('$4::text[]')},
             ${unseen('$5::text[]')}, ${unseen('$9::int[]')})
           WITH ORDINALITY AS row (batch_id, first_position, last_position, parts, merged, cuts, number)
     WHERE row.number NOT IN (SELECT number FROM unwritten)
       AND row.cuts = (SELECT order_cuts FROM batch WHERE batch.batch_id = row.batch_id)
       AND row.first_position - 1 = coalesce((
             SELECT before.last_position FROM batch_order AS before
              WHERE before.batch_id = row.batch_id AND before.first_position < row.first_position
              ORDER BY before.first_position DESC LIMIT 1), 0)
     ORDER BY batch_id
        ON CONFLICT DO NOTHING
    RETURNING batch_id`,
};

/** Rows of the order, each beside how often it was cut; that stands alone if there are no rows. */
const besideCuts = (rows: string) => `
    SELECT batch.order_cuts, stored.* FROM batch LEFT JOIN LATERAL (${rows}) AS stored ON true
     WHERE batch.batch_id = $1 ORDER BY stored.first_position`;

/** From the newest row that says how far each member was merged; from the beginning, if there is none. */
const NEWEST = {
  name: 'batch-order-newest',
  text: besideCuts(`
      SELECT first_position, last_position, parts, merged FROM batch_order
       WHERE batch_id = $1
         AND first_position >= coalesce((SELECT first_position FROM batch_order WHERE batch_id = $1 AND merged IS NOT NULL
                                          ORDER BY first_position DESC LIMIT 1), 0)`),
};

/** From the row that holds the position after $2. */
const AFTER = {
  name: 'batch-order-after',
  text: besideCuts(`
      SELECT first_position, last_position, parts FROM batch_order
       WHERE batch_id = $1
         AND first_position >= coalesce((SELECT first_position FROM batch_order WHERE batch_id = $1 AND first_position <= $2 + 1
                                          ORDER BY first_position DESC LIMIT 1), 0)
       ORDER BY first_position LIMIT $3`),
};

const END = {
  name: 'batch-order-end',
  text: besideCuts(`
      SELECT first_position, last_position, parts FROM batch_order
       WHERE batch_id = $1 ORDER BY first_position DESC LIMIT 1`),
};

export interface StoredRow {
  first_position: number;
  last_position: number;
  parts: string;
}

/** As {@link besideCuts} gives them. */
type RowBesideCuts<Row extends StoredRow = StoredRow> = { order_cuts: number } & (
  Row | { [Key in keyof Row]: null }
);

/** How far the stored order of a batch goes, and whether its last row is the end. */
export interface OrderEnd {
  position: number;
  isFinal: boolean;
  /** How often it was cut. */
  cuts: number;
}

/** A row that is to be appended. */
export interface NewOrderRow extends OrderRow {
  batchId: string;
  /** Logs of the batch itself and of its items. */
  members: string[];
  /** How far each member is merged with this row; with some rows only. */
  merged: number[] | undefined;
  /** How often the order was cut that it continues. */
  cuts: number;
  /** Whether it is still wanted when its turn has come. */
  signal: AbortSignal;
}

/**
 * Appends rows of several batches in one statement. Answers for each whether it was appended: it was not if another process has
 * taken the position, it is there already, the row before it is lost, the order was cut, a log does not go so far, or nobody wants it
 * any more.
 *
 * @param session as long as it lasts, PostgreSQL has not crashed, and what was known of the order holds
 */
export async function appendRows(session: SessionConnection, asked: NewOrderRow[]): Promise<boolean[]> {
  const rows = asked.filter(({ signal }) => !signal.aborted);
  if (rows.length === 0) return asked.map(() => false);
  const ranges = rows.flatMap(({ members, ranges }, index) =>
    ranges.map(({ member, last }) => ({ number: index + 1, log: members[member], last })),
  );
  const values = [
    rows.map(({ batchId }) => batchId),
    rows.map(({ first_position }) => first_position),
    rows.map(({ last_position }) => last_position),
    rows.map(({ ranges }) => partsOf(ranges)),
    rows.map(({ merged }) => (merged ? `{${merged.join()}}` : null)),
    ranges.map(({ number }) => number),
    ranges.map(({ log }) => log),
    ranges.map(({ last }) => last),
    rows.map(({ cuts }) => cuts),
  ];
  const stored = await session.query<{ batch_id: string }>({ ...APPEND, values });
  const appended = new Set(stored.rows.map(({ batch_id }) => batch_id));
  return asked.map(({ batchId, signal }) => !signal.aborted && appended.has(batchId));
}

/** The stored order of one batch. */
export class MergedOrder {
  /** How often it had been cut when its newest rows were read. Whoever cuts it makes all that was known of it void. */
  cuts = 0;

  constructor(
    private readonly pool: Pool,
    private readonly batchId: string,
  ) {}

  /** The newest place where it says how far each member is merged, if there is one, and the rows after it. */
  async newest(): Promise<{ merged: number[] | null; position: number; rows: OrderRow[] }> {
    const found = await this.pool.query<RowBesideCuts<StoredRow & { merged: number[] | null }>>({
      ...NEWEST,
      values: [this.batchId],
    });
    this.cuts = found.rows[0]?.order_cuts ?? 0;
    const rows = found.rows.filter((row) => row.parts !== null);
    const checkpoint = rows[0]?.merged ? rows.shift() : undefined;
    return {
      merged: checkpoint?.merged ?? null,
      position: checkpoint?.last_position ?? 0,
      rows: rows.map(orderRowOf),
    };
  }

  /**
   * The rows from the one on that holds the position after `position`; all of them, or the first `most`. Undefined if the order was cut
   * since its newest rows were read.
   */
  async after(position: number, most: number | null = null): Promise<OrderRow[] | undefined> {
    const { rows } = await this.pool.query<RowBesideCuts>({
      ...AFTER,
      values: [this.batchId, position, most],
    });
    if (rows[0]?.order_cuts !== this.cuts) return undefined;
    const stored = rows.filter((row) => row.parts !== null);
    return stored.filter((row) => row.last_position > position).map(orderRowOf);
  }

  end(): Promise<OrderEnd> {
    return endOfOrder(this.pool, this.batchId);
  }
}

export async function endOfOrder(pool: Pool, batchId: string): Promise<OrderEnd> {
  const { rows } = await pool.query<RowBesideCuts>({ ...END, values: [batchId] });
  const [newest] = rows;
  return {
    position: newest?.last_position ?? 0,
    isFinal: newest?.parts === END_PARTS,
    cuts: newest?.order_cuts ?? 0,
  };
}

export function orderRowOf({ first_position, last_position, parts }: StoredRow): OrderRow {
  const ranges = parts.split(',').map((part) => {
    const [member = NaN, first = NaN, last = NaN] = part.split(/[:-]/).map(Number);
    return { member, first, last };
  });
  return { first_position, last_position, ranges };
}

/** Ranges as they are stored. */
export function partsOf(ranges: Range[]): string {
  return ranges.map(({ member, first, last }) => `${member}:${first}-${last}`).join();
}

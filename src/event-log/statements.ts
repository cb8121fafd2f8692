import { CANCELLED, IS_RUNNING, IS_UNFINISHED } from '../executions/status.js';

/**
 * A parameter that the planner does not look into. Else it takes the few items of its array for a reason to make a new plan at
 * each run, which costs several times what the statement itself does.
 */
export function unseen(parameter: string): string {
  return `(SELECT ${parameter})`;
}

/** How far the log of an execution goes before a sequence; 0 if it is empty. */
function lastBefore(executionId: string, sequence: string): string {
  return `coalesce((
         SELECT before.last_sequence FROM execution_chunk AS before
          WHERE before.execution_id = ${executionId} AND before.first_sequence < ${sequence}
          ORDER BY before.first_sequence DESC LIMIT 1), 0)`;
}

/** How far the log of an execution goes; 0 if it is empty. */
export function lastOf(executionId: string): string {
  return `coalesce((
         SELECT newest.last_sequence FROM execution_chunk AS newest
          WHERE newest.execution_id = ${executionId} ORDER BY newest.first_sequence DESC LIMIT 1), 0)`;
}

/**
 * One flush: a row for each execution, in one text parameter, because escaping an array of texts costs more than the
 * rest of the statement. Only the current attempt of a running execution gets in, as its fence tells: the share lock makes
 * a newer one, which begins with an update of the execution, wait for this statement, and this statement see the newer one.
 * A row that is there already, word for word, is this very statement repeated after a lost connection: it was written.
 * It must follow the row before it: a crash of PostgreSQL can take the last rows away, and no reader may meet a gap.
 * What somebody else holds a lock on is left out, so that one execution's row never holds up the others: see {@link UNWRITTEN}.
 */
export const FLUSH = {
  name: 'event-log-flush',
  text: `
    INSERT INTO execution_chunk AS stored (execution_id, first_sequence, last_sequence, chunks)
    SELECT row.execution_id, row.first_sequence, row.last_sequence, row.chunks
      FROM unnest(${unseen('$1::uuid[]')}, ${unseen('$2::int[]')}, ${unseen('$3::int[]')}, ${unseen('$4::int[]')},
             string_to_array(${unseen('$5::text')}, E'\\x1e'))
             AS row (execution_id, fence, first_sequence, last_sequence, chunks)
      JOIN execution USING (execution_id, fence)
     WHERE execution.status ${IS_RUNNING} AND row.first_sequence - 1 = ${lastBefore('row.execution_id', 'row.first_sequence')}
       FOR SHARE OF execution SKIP LOCKED
        ON CONFLICT (execution_id, first_sequence) DO UPDATE SET last_sequence = excluded.last_sequence
           WHERE stored.chunks = excluded.chunks
    RETURNING execution_id`,
};

/** Of rows that a flush left out, the executions whose row could be written now: it was locked. */
export const UNWRITTEN = {
  name: 'event-log-unwritten',
  text: `
    SELECT row.execution_id FROM unnest($1::uuid[], $2::int[], $3::int[]) AS row (execution_id, fence, first_sequence)
      JOIN execution USING (execution_id, fence)
     WHERE execution.status ${IS_RUNNING} AND row.first_sequence - 1 = ${lastBefore('row.execution_id', 'row.first_sequence')}
       AND NOT EXISTS (SELECT 1 FROM execution_chunk AS stored
                        WHERE stored.execution_id = row.execution_id AND stored.first_sequence = row.first_sequence)`,
};

/**
 * The ends of several executions, each with its terminal chunk, in one transaction; a trigger adds what each of them counts
 * (`counter_delta`), so that no row is locked but the executions' own.
 * A cancellation that was requested wins over every other end, since its client was told that the execution is cancelled.
 * An end that is there already, word for word, counts: the statement was repeated after a lost connection. Like a flush, the
 * terminal chunk must follow the chunk before it. The responses come last: pg would copy a long parameter again for each that follows.
 */
export const END = {
  name: 'event-log-end',
  text: `
    WITH ending AS MATERIALIZED (
      SELECT * FROM unnest(
        $1::uuid[], $2::int[], $3::text[], $4::text[], $5::text[], $6::int[], $7::int[],
        $8::timestamptz[], $9::timestamptz[], $10::int[], string_to_array($11, E'\\x1e'),
        string_to_array($12, E'\\x1e'), string_to_array($13, E'\\x1e')
      ) AS item (execution_id, fence, status, code, error, input_tokens, output_tokens,
                 first_chunk_at, finished_at, sequence, chunk, cancelled_chunk, response)
    ), free AS MATERIALIZED (
      SELECT execution_id FROM execution WHERE execution_id IN (SELECT execution_id FROM ending)
         FOR NO KEY UPDATE SKIP LOCKED
    ), ended AS (
      UPDATE execution SET
             status = CASE WHEN cancel_requested_at IS NULL THEN ending.status ELSE ${CANCELLED} END,
             code = CASE WHEN cancel_requested_at IS NULL THEN ending.code END,
             error = CASE WHEN cancel_requested_at IS NULL THEN ending.error END,
             response = ending.response::json,
             input_tokens = ending.input_tokens, output_tokens = ending.output_tokens,
             first_chunk_at = coalesce(execution.first_chunk_at, ending.first_chunk_at),
             finished_at = ending.finished_at, last_sequence = ending.sequence
        FROM ending JOIN free USING (execution_id)
       WHERE execution.execution_id = ending.execution_id AND execution.fence = ending.fence
         AND execution.status ${IS_UNFINISHED}
         AND ending.sequence - 1 = ${lastBefore('ending.execution_id', 'ending.sequence')}
      RETURNING execution.execution_id, execution.fence, execution.status
    ), logged AS (
      INSERT INTO execution_chunk (execution_id, first_sequence, last_sequence, chunks)
      SELECT execution_id, sequence, sequence, CASE WHEN ended.status = ending.status THEN chunk ELSE cancelled_chunk END
        FROM ending JOIN ended USING (execution_id, fence)
    )
    SELECT execution_id, fence, status FROM ended
    UNION
    SELECT execution_id, fence, execution.status
      FROM ending JOIN execution USING (execution_id, fence) JOIN execution_chunk AS stored USING (execution_id)
     WHERE stored.first_sequence = ending.sequence AND stored.chunks IN (ending.chunk, ending.cancelled_chunk)
    UNION
    SELECT execution_id, fence, execution.status FROM ending JOIN execution USING (execution_id, fence)
     WHERE execution.status ${IS_UNFINISHED} AND execution_id NOT IN (SELECT execution_id FROM free)`,
};

/**
 * For each of some readers, numbered from 1, the rows that hold anything after its cursor, beginning with the row that holds
 * the very next chunk, cut after $3 rows or about $4 bytes, and all of them after about $5 bytes. Both ends are found through the
 * primary key, so the price does not depend on the cursor.
 */
export const READ = {
  name: 'event-log-read',
  text: `
    SELECT reader::int, first_sequence, last_sequence, chunks
      FROM (
        SELECT reader, own.*, sum(octet_length(chunks)) OVER (ORDER BY reader, first_sequence) - octet_length(chunks) AS bytes_before_all
          FROM unnest(${unseen('$1::uuid[]')}, ${unseen('$2::int[]')}) WITH ORDINALITY AS asked (execution_id, after, reader)
         CROSS JOIN LATERAL (
           SELECT *, sum(octet_length(chunks)) OVER (ORDER BY first_sequence) - octet_length(chunks) AS bytes_before
             FROM (SELECT first_sequence, last_sequence, chunks FROM execution_chunk
                    WHERE execution_id = asked.execution_id
                      AND first_sequence >= coalesce((SELECT max(first_sequence) FROM execution_chunk
                                                       WHERE execution_id = asked.execution_id
                                                         AND first_sequence <= asked.after + 1), 0)
                    ORDER BY first_sequence LIMIT $3) AS next_rows) AS own
         WHERE bytes_before < $4 AND last_sequence > after) AS sized
     WHERE bytes_before_all < $5
     ORDER BY reader, first_sequence`,
};

/** How far the logs of some executions go, for the poll that backs up the notifications. */
export const POSITIONS = {
  name: 'event-log-positions',
  text: `
    SELECT asked.execution_id, newest.last_sequence
      FROM unnest($1::uuid[]) AS asked (execution_id)
     CROSS JOIN LATERAL (SELECT last_sequence FROM execution_chunk
                          WHERE execution_chunk.execution_id = asked.execution_id
                          ORDER BY first_sequence DESC LIMIT 1) AS newest`,
};

/**
 * For each of some ranges of sequences, numbered from 1, the rows that hold them, cut after about $4 bytes in all.
 */
export const READ_RANGES = {
  name: 'event-log-read-ranges',
  text: `
    SELECT range::int, first_sequence, last_sequence, chunks
      FROM (
        SELECT asked.range, stored.*,
               sum(octet_length(chunks)) OVER (ORDER BY asked.range, first_sequence) - octet_length(chunks) AS bytes_before
          FROM unnest(${unseen('$1::uuid[]')}, ${unseen('$2::int[]')}, ${unseen('$3::int[]')})
               WITH ORDINALITY AS asked (execution_id, first, last, range)
         CROSS JOIN LATERAL (
           SELECT first_sequence, last_sequence, chunks FROM execution_chunk
            WHERE execution_id = asked.execution_id
              AND first_sequence >= coalesce((SELECT max(first_sequence) FROM execution_chunk
                                               WHERE execution_id = asked.execution_id
                                                 AND first_sequence <= asked.first), 0)
              AND first_sequence <= asked.last) AS stored) AS sized
     WHERE bytes_before < $4
     ORDER BY range, first_sequence`,
};

import { COUNTS } from '../database/counted-deployment.js';
import { GRANULARITIES } from '../database/entities/execution-statistics.entity.js';
import { IS_CANCELLED, IS_COMPLETED, IS_ERROR } from '../executions/status.js';
import { binOf } from './histogram.js';

/** What of an execution statistics are made of, as SQL reads it from its row; the trigger of `counter_delta` does the same. */
export const ENDED_EXECUTION = `
  execution.deployment_id, execution.status, execution.finished_at,
  ${millisecondsUntil('execution.finished_at')} AS duration_ms,
  ${millisecondsUntil('execution.first_chunk_at')} AS time_to_first_chunk_ms,
  execution.input_tokens::bigint AS input_tokens, execution.output_tokens::bigint AS output_tokens`;

/** From the acceptance of an execution; what a clock that was set back makes negative counts as 0. */
function millisecondsUntil(moment: string): string {
  const elapsed = `extract(epoch FROM ${moment} - execution.created_at) * 1000`;
  return `(CASE WHEN ${moment} IS NOT NULL THEN least(greatest(${elapsed}, 0), 2147483647)::int END)`;
}

/**
 * SQL of the queries of a WITH that add ended executions to the statistics of each minute, hour and day.
 *
 * @param ended name of a query with the columns of {@link ENDED_EXECUTION}
 */
function rollUp(ended: string): string {
  const bins = (of: string, condition: string) => `
    SELECT deployment_id, granularity, bucket_start, array_agg(bin ORDER BY bin) AS bins,
           array_agg(count ORDER BY bin) AS counts
      FROM (SELECT deployment_id, granularity, bucket_start, ${binOf(of)} AS bin, count(*)::int AS count
              FROM placed WHERE ${condition} GROUP BY 1, 2, 3, 4) AS binned
     GROUP BY 1, 2, 3`;
  const merged = (name: string) => `(
    SELECT coalesce(array_agg(bin ORDER BY bin), '{}'), coalesce(array_agg(count ORDER BY bin), '{}')
      FROM (SELECT bin, sum(count)::int AS count
              FROM (SELECT * FROM unnest(stored.${name}_bins, stored.${name}_counts)
                    UNION ALL SELECT * FROM unnest(excluded.${name}_bins, excluded.${name}_counts)) AS each (bin, count)
             GROUP BY bin) AS summed)`;
  const added = (column: string) => `${column} = stored.${column} + excluded.${column}`;
  return `
  placed AS (
    SELECT ended.*, granularity, date_trunc(granularity, finished_at, 'UTC') AS bucket_start
      FROM ${ended} AS ended CROSS JOIN unnest('{${GRANULARITIES.join()}}'::text[]) AS granularity
  ), summed AS (
    SELECT deployment_id, granularity, bucket_start, count(*)::int AS execution_count,
           (count(*) FILTER (WHERE status ${IS_COMPLETED}))::int AS success_count,
           (count(*) FILTER (WHERE status ${IS_ERROR}))::int AS error_count,
           (count(*) FILTER (WHERE status ${IS_CANCELLED}))::int AS cancelled_count,
           sum(input_tokens)::bigint AS input_tokens, sum(output_tokens)::bigint AS output_tokens,
           max(finished_at) AS last_executed_at, max(finished_at) FILTER (WHERE status ${IS_ERROR}) AS last_error_at
      FROM placed GROUP BY 1, 2, 3
  ), durations AS (${bins('duration_ms', `NOT status ${IS_CANCELLED}`)}
  ), first_chunks AS (${bins('time_to_first_chunk_ms', 'time_to_first_chunk_ms IS NOT NULL')}
  ), rolled_up AS (
    INSERT INTO execution_statistics AS stored
           (deployment_id, granularity, bucket_start, execution_count, success_count, error_count, cancelled_count,
            input_tokens, output_tokens, last_executed_at, last_error_at, duration_bins, duration_counts,
            first_chunk_bins, first_chunk_counts)
    SELECT summed.*, coalesce(durations.bins, '{}'), coalesce(durations.counts, '{}'),
           coalesce(first_chunks.bins, '{}'), coalesce(first_chunks.counts, '{}')
      FROM summed LEFT JOIN durations USING (deployment_id, granularity, bucket_start)
      LEFT JOIN first_chunks USING (deployment_id, granularity, bucket_start)
        ON CONFLICT (deployment_id, granularity, bucket_start) DO UPDATE SET
           ${['execution_count', 'success_count', 'error_count', 'cancelled_count', 'input_tokens', 'output_tokens'].map(added).join(', ')},
           last_executed_at = greatest(stored.last_executed_at, excluded.last_executed_at),
           last_error_at = greatest(stored.last_error_at, excluded.last_error_at),
           (duration_bins, duration_counts) = ${merged('duration')},
           (first_chunk_bins, first_chunk_counts) = ${merged('first_chunk')}
  )`;
}

/** Whether there are ends to add, or a backfill to go on with. */
export const IS_DUE = {
  name: 'counters-are-due',
  text: `
    SELECT EXISTS (SELECT 1 FROM counter_delta WHERE NOT folded) AS ends,
           EXISTS (SELECT 1 FROM statistics_backfill) AS backfill`,
};

/** How many ends are not added yet, up to a number ($1), and since when the oldest waits, in s. */
export const LEFT = {
  name: 'counters-left',
  text: `
    SELECT count(*)::int AS ends,
           coalesce(greatest(extract(epoch FROM now() - min(finished_at)), 0), 0)::float8 AS age
      FROM (SELECT finished_at FROM counter_delta WHERE NOT folded LIMIT $1) AS waiting`,
};

/**
 * Adds $1 ends at most to the counters and the statistics of their deployments. It waits for nobody: a deployment that somebody
 * has locked is left for the next time. Ends of a deployment that was deleted go. In a transaction under the lock `counters`.
 */
export const FOLD = {
  name: 'counters-fold',
  text: `
  WITH folding AS MATERIALIZED (
    SELECT set_config('agent_studio.folds_counters', 'on', true)
  ), locked AS MATERIALIZED (
    SELECT deployment_id FROM deployment
     WHERE deployment_id IN (SELECT deployment_id FROM counter_delta WHERE NOT folded)
     ORDER BY deployment_id FOR NO KEY UPDATE SKIP LOCKED
  ), chosen AS MATERIALIZED (
    SELECT deployment_id, execution_id, finished_at FROM counter_delta
     WHERE NOT folded
       AND (deployment_id IN (SELECT deployment_id FROM locked)
            OR NOT EXISTS (SELECT 1 FROM deployment WHERE deployment.deployment_id = counter_delta.deployment_id))
     LIMIT $1
  ), kept AS (
    UPDATE counter_delta SET folded = true FROM chosen, statistics_backfill
     WHERE counter_delta.deployment_id = chosen.deployment_id AND counter_delta.execution_id = chosen.execution_id
       AND chosen.execution_id < statistics_backfill.below
    RETURNING counter_delta.*
  ), removed AS (
    DELETE FROM counter_delta USING chosen
     WHERE counter_delta.deployment_id = chosen.deployment_id AND counter_delta.execution_id = chosen.execution_id
       AND NOT EXISTS (SELECT 1 FROM statistics_backfill WHERE chosen.execution_id < statistics_backfill.below)
    RETURNING counter_delta.*
  ), taken AS MATERIALIZED (
    SELECT * FROM kept UNION ALL SELECT * FROM removed
  ), known AS MATERIALIZED (
    SELECT deployment_id, status, finished_at, duration_ms, time_to_first_chunk_ms, input_tokens, output_tokens
      FROM taken JOIN locked USING (deployment_id)
  ), counted AS (
    UPDATE deployment SET
           execution_count = execution_count + ends.all_ends,
           success_count = success_count + ends.completed,
           error_count = error_count + ends.failed,
           cancelled_count = cancelled_count + ends.cancelled,
           last_executed_at = greatest(last_executed_at, ends.last_at),
           last_error = CASE WHEN ends.failed_at >= coalesce(last_error_at, ends.failed_at) THEN
             (SELECT error FROM execution WHERE execution.execution_id = ends.failed_id)
           ELSE last_error END,
           last_error_at = greatest(last_error_at, ends.failed_at)
      FROM (SELECT deployment_id, ${COUNTS} FROM taken GROUP BY deployment_id) AS ends, folding, locked
     WHERE deployment.deployment_id = ends.deployment_id AND locked.deployment_id = ends.deployment_id
  ), ${rollUp('known')}
  SELECT count(*)::int AS taken FROM taken`,
};

/**
 * Adds the next $1 executions that ended before there were roll-ups, the newest first, and notes how far it came. One whose end
 * wrote a delta is passed over: that delta is, or was, added. In a transaction under the lock `counters`.
 */
export const BACKFILL = {
  name: 'counters-backfill',
  text: `
  WITH piece AS MATERIALIZED (
    SELECT execution.execution_id, ${ENDED_EXECUTION}
      FROM execution
     WHERE execution.execution_id < (SELECT below FROM statistics_backfill)
     ORDER BY execution.execution_id DESC LIMIT $1
  ), known AS MATERIALIZED (
    SELECT deployment_id, status, finished_at, duration_ms, time_to_first_chunk_ms, input_tokens, output_tokens
      FROM piece
     WHERE finished_at IS NOT NULL
       AND EXISTS (SELECT 1 FROM deployment WHERE deployment.deployment_id = piece.deployment_id)
       AND NOT EXISTS (SELECT 1 FROM counter_delta WHERE counter_delta.deployment_id = piece.deployment_id
                          AND counter_delta.execution_id = piece.execution_id)
  ), ${rollUp('known')}, moved AS (
    UPDATE statistics_backfill SET below = lowest.execution_id
      FROM (SELECT execution_id FROM piece ORDER BY execution_id LIMIT 1) AS lowest
  )
  SELECT count(*)::int AS looked_at FROM piece`,
};

/** After the last piece: what was kept for the backfill goes, too. */
export const END_BACKFILL = `
  WITH ended AS (DELETE FROM statistics_backfill)
  DELETE FROM counter_delta WHERE folded`;

/** Days for which minutes are kept; statistics of earlier minutes are made from the executions themselves. */
export const MINUTES_KEPT_DAYS = 35;

/**
 * Deletes statistics that nobody reads any more, $1 at most: minutes that are older than $2 days, and all of deployments that
 * were deleted. The deployments are found one after the other through the primary key.
 */
export const PRUNE = {
  name: 'statistics-prune',
  text: `
  WITH RECURSIVE summed_up AS (
    (SELECT deployment_id FROM execution_statistics ORDER BY deployment_id LIMIT 1)
    UNION ALL
    SELECT (SELECT next.deployment_id FROM execution_statistics AS next
             WHERE next.deployment_id > summed_up.deployment_id ORDER BY next.deployment_id LIMIT 1)
      FROM summed_up WHERE summed_up.deployment_id IS NOT NULL
  ), old AS MATERIALIZED (
    SELECT row.* FROM summed_up LEFT JOIN deployment USING (deployment_id) CROSS JOIN LATERAL (
      (SELECT deployment_id, granularity, bucket_start FROM execution_statistics AS stored
        WHERE stored.deployment_id = summed_up.deployment_id AND deployment.deployment_id IS NULL LIMIT $1)
      UNION ALL
      (SELECT deployment_id, granularity, bucket_start FROM execution_statistics AS stored
        WHERE stored.deployment_id = summed_up.deployment_id
          AND granularity = 'minute' AND bucket_start < now() - $2 * interval '1 day' LIMIT $1)) AS row
     WHERE summed_up.deployment_id IS NOT NULL LIMIT $1
  )
  DELETE FROM execution_statistics AS stored USING old
   WHERE stored.deployment_id = old.deployment_id AND stored.granularity = old.granularity
     AND stored.bucket_start = old.bucket_start`,
};

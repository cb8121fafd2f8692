import { IS_CANCELLED, IS_COMPLETED, IS_ERROR } from '../executions/status.js';
import { binOf, quantiles } from './histogram.js';
import { ENDED_EXECUTION } from './roll-ups.statements.js';

/** The quantiles of the totals and of each step of a series. */
const QUANTILES = [0.5, 0.95, 0.99];

/** Executions that are in no roll-up: not yet, because their end is not added, or older than the backfill has come. */
const NOT_ROLLED_UP = `
  SELECT counter_delta.status, counter_delta.finished_at, counter_delta.duration_ms, counter_delta.time_to_first_chunk_ms,
         counter_delta.input_tokens, counter_delta.output_tokens
    FROM segment JOIN counter_delta
      ON counter_delta.deployment_id = $1 AND NOT folded AND finished_at >= first AND finished_at < past
   WHERE segment.granularity IS NOT NULL
   UNION ALL
  SELECT status, finished_at, duration_ms, time_to_first_chunk_ms, input_tokens, output_tokens
    FROM segment CROSS JOIN LATERAL (
      SELECT ${ENDED_EXECUTION} FROM execution
       WHERE deployment_id = $1 AND finished_at >= first AND finished_at < past
         AND execution_id < (SELECT below FROM statistics_backfill)
         AND NOT EXISTS (SELECT 1 FROM counter_delta WHERE counter_delta.deployment_id = $1
                            AND counter_delta.execution_id = execution.execution_id)) AS older
   WHERE segment.granularity IS NOT NULL AND (SELECT true FROM statistics_backfill)`;

/** Executions one by one, for times that are not a whole minute. */
const OF_PARTS_OF_MINUTES = `
  SELECT status, finished_at, duration_ms, time_to_first_chunk_ms, input_tokens, output_tokens
    FROM segment CROSS JOIN LATERAL (
      SELECT ${ENDED_EXECUTION} FROM execution
       WHERE deployment_id = $1 AND finished_at >= first AND finished_at < past) AS single
   WHERE segment.granularity IS NULL`;

/** The bins of what is rolled up, and of single executions. What comes first is only asked for in all. */
const BINS = `
  SELECT step, 'duration' AS kind, bin, count
    FROM rolled_up CROSS JOIN LATERAL unnest(duration_bins, duration_counts) AS each (bin, count)
   UNION ALL
  SELECT NULL, 'first_chunk', bin, count
    FROM rolled_up CROSS JOIN LATERAL unnest(first_chunk_bins, first_chunk_counts) AS each (bin, count)
   UNION ALL
  SELECT step, 'duration', ${binOf('duration_ms')}, 1 FROM single WHERE NOT status ${IS_CANCELLED}
   UNION ALL
  SELECT NULL, 'first_chunk', ${binOf('time_to_first_chunk_ms')}, 1 FROM single WHERE time_to_first_chunk_ms IS NOT NULL`;

/**
 * The totals and each step of the series, of one moment. $1: the deployment. $2, $3, $4: the times that count, cut into segments
 * that don't overlap: the granularity to read (null: the executions themselves), the begin and the end. $5: where the series
 * begins; what is before shares the row whose `step` is null. $6: the length of a step.
 */
export const STATISTICS = `
  WITH segment AS MATERIALIZED (
    SELECT * FROM unnest($2::text[], $3::timestamptz[], $4::timestamptz[]) AS segment (granularity, first, past)
  ), rolled_up AS MATERIALIZED (
    SELECT CASE WHEN bucket_start >= $5 THEN date_trunc($6, bucket_start, 'UTC') END AS step, stored.*
      FROM segment CROSS JOIN LATERAL (
        SELECT * FROM execution_statistics
         WHERE deployment_id = $1 AND execution_statistics.granularity = segment.granularity
           AND bucket_start >= first AND bucket_start < past) AS stored
  ), single AS MATERIALIZED (
    SELECT CASE WHEN finished_at >= $5 THEN date_trunc($6, finished_at, 'UTC') END AS step, one.*
      FROM (${OF_PARTS_OF_MINUTES} UNION ALL ${NOT_ROLLED_UP}) AS one
  ), counts AS (
    SELECT grouping(step) = 1 AS is_total, step, coalesce(sum(all_ends), 0)::int AS execution_count,
           coalesce(sum(completed), 0)::int AS success_count, coalesce(sum(failed), 0)::int AS error_count,
           coalesce(sum(cancelled), 0)::int AS cancelled_count, max(last_at) AS last_executed_at,
           max(failed_at) AS last_error_at, coalesce(sum(input_tokens), 0)::float8 AS input_tokens,
           coalesce(sum(output_tokens), 0)::float8 AS output_tokens
      FROM (SELECT step, execution_count AS all_ends, success_count AS completed, error_count AS failed,
                   cancelled_count AS cancelled, last_executed_at AS last_at, last_error_at AS failed_at, input_tokens,
                   output_tokens
              FROM rolled_up
             UNION ALL
            SELECT step, 1, (status ${IS_COMPLETED})::int, (status ${IS_ERROR})::int, (status ${IS_CANCELLED})::int,
                   finished_at, CASE WHEN status ${IS_ERROR} THEN finished_at END, input_tokens, output_tokens
              FROM single) AS parts
     GROUP BY GROUPING SETS ((), (step))
  ), binned AS (
    SELECT grouping(step) = 1 AS is_total, step, kind, bin, sum(count) AS count
      FROM (${BINS}) AS bins
     GROUP BY GROUPING SETS ((kind, bin), (step, kind, bin))
  ), ranked AS (
    SELECT is_total, step, kind, bin,
           sum(count) OVER (PARTITION BY is_total, step, kind ORDER BY bin) AS upto,
           sum(count) OVER (PARTITION BY is_total, step, kind) AS total
      FROM binned
  ), percentiles AS (
    SELECT is_total, step, kind, ${quantiles(QUANTILES)} AS at FROM ranked GROUP BY is_total, step, kind
  )
  SELECT counts.*, durations.at AS duration_ms, first_chunks.at AS time_to_first_chunk_ms
    FROM counts
    LEFT JOIN percentiles AS durations
      ON durations.kind = 'duration' AND durations.is_total = counts.is_total
     AND coalesce(durations.step, '-infinity') = coalesce(counts.step, '-infinity')
    LEFT JOIN percentiles AS first_chunks
      ON first_chunks.kind = 'first_chunk' AND first_chunks.is_total AND counts.is_total`;

/** What an execution that failed at a moment ($2) said. */
export const FAILURE_AT = {
  name: 'statistics-failure-at',
  text: `
    SELECT error FROM execution WHERE deployment_id = $1 AND finished_at = $2 AND status ${IS_ERROR} LIMIT 1`,
};

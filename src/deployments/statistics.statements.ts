import { IS_CANCELLED, IS_COMPLETED, IS_ERROR } from '../executions/status.js';
import { binOf, quantiles } from './histogram.js';
import { ENDED_EXECUTION } from './roll-ups.statements.js';

/** The quantiles of the totals, and of each step of a series. */
const QUANTILES = [0.5, 0.95, 0.99];
const QUANTILES_OF_STEPS = [0.5, 0.95];

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

/** FROM item of every bin of some parts. */
const binsOf = (parts: string) => `${parts} CROSS JOIN LATERAL unnest(bins, counts) AS each (bin, count)`;

/** The bins of single executions of each step, as a roll-up has them. */
const binsOfSingle = (of: string, condition: string) => `
  SELECT step, array_agg(bin) AS bins, array_agg(count) AS counts
    FROM (SELECT step, ${binOf(of)} AS bin, count(*)::int AS count FROM single WHERE ${condition} GROUP BY 1, 2) AS binned
   GROUP BY step`;

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
  ), durations AS MATERIALIZED (
    SELECT step, duration_bins AS bins, duration_counts AS counts FROM rolled_up
     UNION ALL ${binsOfSingle('duration_ms', `NOT status ${IS_CANCELLED}`)}
  ), first_chunks AS (
    SELECT first_chunk_bins AS bins, first_chunk_counts AS counts FROM rolled_up
     UNION ALL SELECT bins, counts FROM (${binsOfSingle('time_to_first_chunk_ms', 'time_to_first_chunk_ms IS NOT NULL')}) AS of_single
  ), duration_steps AS (
    SELECT step, array_agg(ROW(bins, counts)) AS parts FROM durations WHERE step IS NOT NULL GROUP BY step
  )
  SELECT counts.*,
         CASE WHEN is_total THEN ${quantiles(QUANTILES, binsOf('durations'))}
              ELSE ${quantiles(QUANTILES_OF_STEPS, binsOf('unnest(parts) AS part (bins int[], counts int[])'))}
         END AS duration_ms,
         CASE WHEN is_total THEN ${quantiles(QUANTILES, binsOf('first_chunks'))} END AS time_to_first_chunk_ms
    FROM counts LEFT JOIN duration_steps ON NOT is_total AND duration_steps.step = counts.step`;

/** What an execution that failed at a moment ($2) said. */
export const FAILURE_AT = {
  name: 'statistics-failure-at',
  text: `
    SELECT error FROM execution WHERE deployment_id = $1 AND finished_at = $2 AND status ${IS_ERROR} LIMIT 1`,
};

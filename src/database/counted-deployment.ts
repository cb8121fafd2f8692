import { IS_CANCELLED, IS_COMPLETED, IS_ERROR } from '../executions/status.js';

/**
 * SQL of a relation with the columns of `deployment` whose counters hold every end that is committed: those of the row and the
 * deltas that are not added to it yet. `source` is the table, or a query's name for some of its rows.
 */
export function countedDeployment(source = 'deployment'): string {
  return `(
    SELECT stored.deployment_id, stored.deployment_name, stored.environment, stored.workflow_id, stored.revision_id,
           stored.status, stored.deployed_by, stored.deployed_at, stored.stopped_at,
           (stored.execution_count + ends.all_ends)::int AS execution_count,
           (stored.success_count + ends.completed)::int AS success_count,
           (stored.error_count + ends.failed)::int AS error_count,
           (stored.cancelled_count + ends.cancelled)::int AS cancelled_count,
           greatest(stored.last_executed_at, ends.last_at) AS last_executed_at,
           CASE WHEN ends.failed_at >= coalesce(stored.last_error_at, ends.failed_at) THEN
             (SELECT error FROM execution WHERE execution.execution_id = ends.failed_id)
           ELSE stored.last_error END AS last_error,
           greatest(stored.last_error_at, ends.failed_at) AS last_error_at
      FROM ${source} AS stored
     CROSS JOIN LATERAL (
       SELECT ${COUNTS}
         FROM counter_delta WHERE counter_delta.deployment_id = stored.deployment_id AND NOT folded) AS ends)`;
}

/** What a set of deltas adds to the counters of a deployment. */
export const COUNTS = `
  count(*) AS all_ends,
  count(*) FILTER (WHERE status ${IS_COMPLETED}) AS completed,
  count(*) FILTER (WHERE status ${IS_ERROR}) AS failed,
  count(*) FILTER (WHERE status ${IS_CANCELLED}) AS cancelled,
  max(finished_at) AS last_at,
  max(finished_at) FILTER (WHERE status ${IS_ERROR}) AS failed_at,
  (array_agg(execution_id ORDER BY finished_at DESC) FILTER (WHERE status ${IS_ERROR}))[1] AS failed_id`;

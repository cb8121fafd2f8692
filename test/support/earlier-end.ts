/**
 * The statement with which a process of an earlier release ends executions, word for word: it adds to the counters of the
 * deployments itself, and runs beside newer processes while a system is upgraded.
 */
function lastBefore(executionId: string, sequence: string): string {
  return `coalesce((
         SELECT before.last_sequence FROM execution_chunk AS before
          WHERE before.execution_id = ${executionId} AND before.first_sequence < ${sequence}
          ORDER BY before.first_sequence DESC LIMIT 1), 0)`;
}

export const EARLIER_END = {
  name: 'event-log-end',
  text: `
    WITH ending AS MATERIALIZED (
      SELECT * FROM unnest(
        $1::uuid[], $2::int[], $3::text[], $4::text[], $5::text[], string_to_array($6, E'\\x1e'), $7::int[], $8::int[],
        $9::timestamptz[], $10::timestamptz[], $11::int[], string_to_array($12, E'\\x1e'),
        string_to_array($13, E'\\x1e')
      ) AS item (execution_id, fence, status, code, error, response, input_tokens, output_tokens,
                 first_chunk_at, finished_at, sequence, chunk, cancelled_chunk)
    ), ended AS (
      UPDATE execution SET
             status = CASE WHEN cancel_requested_at IS NULL THEN ending.status ELSE 'cancelled' END,
             code = CASE WHEN cancel_requested_at IS NULL THEN ending.code END,
             error = CASE WHEN cancel_requested_at IS NULL THEN ending.error END,
             response = ending.response::json,
             input_tokens = ending.input_tokens, output_tokens = ending.output_tokens,
             first_chunk_at = coalesce(execution.first_chunk_at, ending.first_chunk_at),
             finished_at = ending.finished_at, last_sequence = ending.sequence
        FROM ending
       WHERE execution.execution_id = ending.execution_id AND execution.fence = ending.fence
         AND execution.status IN ('queued', 'running')
         AND ending.sequence - 1 = ${lastBefore('ending.execution_id', 'ending.sequence')}
      RETURNING execution.execution_id, execution.fence, execution.deployment_id, execution.status, execution.error, execution.finished_at
    ), logged AS (
      INSERT INTO execution_chunk (execution_id, first_sequence, last_sequence, chunks)
      SELECT execution_id, sequence, sequence, CASE WHEN ended.status = ending.status THEN chunk ELSE cancelled_chunk END
        FROM ending JOIN ended USING (execution_id, fence)
    ), locked AS MATERIALIZED (
      SELECT deployment_id FROM deployment
       WHERE deployment_id IN (SELECT deployment_id FROM ended) ORDER BY deployment_id FOR NO KEY UPDATE
    ), counted AS (
      UPDATE deployment SET
             execution_count = execution_count + ends.all_ends,
             success_count = success_count + ends.completed,
             error_count = error_count + ends.failed,
             cancelled_count = cancelled_count + ends.cancelled,
             last_executed_at = greatest(last_executed_at, ends.last_at),
             last_error = CASE WHEN ends.failed > 0 THEN ends.failure ELSE deployment.last_error END,
             last_error_at = CASE WHEN ends.failed > 0 THEN ends.failed_at ELSE deployment.last_error_at END
        FROM (SELECT deployment_id, count(*) AS all_ends,
                     count(*) FILTER (WHERE status = 'completed') AS completed,
                     count(*) FILTER (WHERE status = 'error') AS failed,
                     count(*) FILTER (WHERE status = 'cancelled') AS cancelled,
                     max(finished_at) AS last_at,
                     max(finished_at) FILTER (WHERE status = 'error') AS failed_at,
                     (array_agg(error ORDER BY finished_at DESC) FILTER (WHERE status = 'error'))[1] AS failure
                FROM ended JOIN locked USING (deployment_id) GROUP BY deployment_id) AS ends
       WHERE deployment.deployment_id = ends.deployment_id
    )
    SELECT execution_id, fence, status FROM ended
    UNION
    SELECT execution_id, fence, execution.status
      FROM ending JOIN execution USING (execution_id, fence) JOIN execution_chunk AS stored USING (execution_id)
     WHERE stored.first_sequence = ending.sequence AND stored.chunks IN (ending.chunk, ending.cancelled_chunk)`,
};

/** Values of {@link EARLIER_END} for executions that hold `started` only, and all end in the same way. */
export function endsOf(executions: { execution_id: string; fence: number }[], status: string): unknown[] {
  const each = <Value>(value: Value) => executions.map(() => value);
  const finishedAt = new Date();
  return [
    executions.map(({ execution_id }) => execution_id),
    executions.map(({ fence }) => fence),
    each(status),
    each(status === 'error' ? 'agent_error' : null),
    each(status === 'error' ? 'it failed at an earlier release' : null),
    each('""').join('\u001e'),
    each(10),
    each(2),
    each(null),
    each(finishedAt),
    each(2),
    each('{}').join('\u001e'),
    each('{}').join('\u001e'),
  ];
}

import { v7 as uuidv7 } from 'uuid';
import type { TestDatabase } from './database.js';
import type { Deployment } from './deployments.js';

/** What tests give an execution. */
export interface EndedExecution {
  status: string;
  finishedAt: Date | null;
  durationMs: number;
  firstChunkMs?: number | null;
}

/** Writes executions with one statement, as they would be after their end, whose trigger is passed by. Their ids, in order. */
export async function insertExecutions(
  database: TestDatabase,
  deployment: Deployment,
  executions: EndedExecution[],
): Promise<string[]> {
  const ids = executions.map(() => uuidv7());
  await database.query(
    `INSERT INTO execution (execution_id, deployment_id, deployment_name, environment, workflow_id, revision_id, status,
                            fence, input, error, input_tokens, output_tokens, created_at, first_chunk_at, finished_at)
     SELECT id, $1, $2, $3, $4, $5, status, 7, '{}', CASE WHEN status = 'error' THEN 'failure of ' || id END, 10, 2,
            coalesce(finished_at, now()) - duration * interval '1 ms',
            coalesce(finished_at, now()) + (first_chunk - duration) * interval '1 ms', finished_at
       FROM unnest($6::uuid[], $7::text[], $8::timestamptz[], $9::float8[], $10::float8[])
            AS given (id, status, finished_at, duration, first_chunk)`,
    [
      deployment.deployment_id,
      deployment.deployment_name,
      deployment.environment,
      deployment.workflow_id,
      deployment.revision_id,
      ids,
      executions.map(({ status }) => status),
      executions.map(({ finishedAt }) => finishedAt),
      executions.map(({ durationMs }) => durationMs),
      executions.map(({ firstChunkMs }) => firstChunkMs ?? null),
    ],
  );
  return ids;
}

/** As after an upgrade: nothing is in the statistics, and the executions are still to be added to them. */
export async function forgetStatistics(database: TestDatabase): Promise<void> {
  await database.query('DELETE FROM execution_statistics');
  await database.query('DELETE FROM statistics_backfill');
  await database.query(`INSERT INTO statistics_backfill VALUES ('ffffffff-ffff-ffff-ffff-ffffffffffff')`);
}

import { Injectable, Logger } from '@nestjs/common';
import type { OnApplicationShutdown } from '@nestjs/common';
import { Pool } from 'pg';
import { GroupCommit } from '../database/group-commit.js';
import type { Step } from '../database/entities/step.entity.js';
import { ROW_SEPARATOR } from '../database/row-separator.js';
import { retryWhileUnavailable } from '../database/unavailable.js';

/**
 * Only the current attempt of an execution gets in, as its fence ($14) tells: the share lock makes a newer one wait for this
 * statement, and this statement see the newer one. $13 says whether the commit waits for the disk. The log must go as far as
 * when the step ended ($15): if PostgreSQL crashed and lost what its agent said, the step has to run again.
 */
const SAVE = {
  name: 'step-save',
  text: `
    WITH durability AS MATERIALIZED (SELECT set_config('synchronous_commit', $13, true))
    INSERT INTO step (step_id, execution_id, agent_id, status, attempt, output, error, code, input_tokens, output_tokens,
                      started_at, finished_at)
    SELECT item.step_id, execution_id, item.agent_id, item.status, item.attempt, nullif(item.output, '')::json, item.error,
           item.code, item.input_tokens, item.output_tokens, item.started_at, item.finished_at
      FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::int[], string_to_array($6, E'\\x1e'), $7::text[],
                  $8::text[], $9::int[], $10::int[], $11::timestamptz[], $12::timestamptz[], $14::int[], $15::int[])
             AS item (step_id, execution_id, agent_id, status, attempt, output, error, code, input_tokens, output_tokens,
                      started_at, finished_at, fence, logged)
      JOIN execution USING (execution_id, fence), durability
     WHERE item.logged <= coalesce((SELECT last_sequence FROM execution_chunk
                                     WHERE execution_chunk.execution_id = item.execution_id
                                     ORDER BY first_sequence DESC LIMIT 1), 0)
       FOR SHARE OF execution
        ON CONFLICT (execution_id, agent_id) DO UPDATE SET
           status = excluded.status, attempt = excluded.attempt, output = excluded.output, error = excluded.error,
           code = excluded.code, input_tokens = excluded.input_tokens, output_tokens = excluded.output_tokens,
           started_at = excluded.started_at, finished_at = excluded.finished_at`,
};

/** What makes a step one of the attempt that owns the execution. */
export interface StepOwner {
  fence: number;
  /** Sequence of the last chunk that was in the log when the step ended; 0 for one that has only begun. */
  logged: number;
}

type Save = Step & StepOwner;

/** Writes steps, those of all executions that change in the same moment in one statement. */
@Injectable()
export class StepStore implements OnApplicationShutdown {
  private readonly logger = new Logger(StepStore.name);
  private readonly shutdown = new AbortController();
  private readonly saves = new GroupCommit<Save, void>((steps) => this.write(steps));

  constructor(private readonly pool: Pool) {}

  onApplicationShutdown(): void {
    this.shutdown.abort(new Error('The step store is closed.'));
  }

  /** Resolves after the commit, however long the database is away, or when a newer attempt shuts this one out. Saves of the same step keep their order. */
  save(step: Step, owner: StepOwner): Promise<void> {
    return this.saves.add({ ...step, ...owner });
  }

  private async write(saves: Save[]): Promise<void[]> {
    // One statement can't write a row twice: the last state of a step stands for all of them. Another attempt's gets in or not by its fence.
    const steps = [...new Map(saves.map((step) => [`${step.step_id}:${step.fence}`, step])).values()];
    const values = [
      steps.map((step) => step.step_id),
      steps.map((step) => step.execution_id),
      steps.map((step) => step.agent_id),
      steps.map((step) => step.status),
      steps.map((step) => step.attempt),
      steps.map((step) => (step.output === null ? '' : JSON.stringify(step.output))).join(ROW_SEPARATOR),
      steps.map((step) => step.error?.replaceAll('\u0000', '\ufffd') ?? null), // `text` can't hold U+0000
      steps.map((step) => step.code),
      steps.map((step) => step.input_tokens),
      steps.map((step) => step.output_tokens),
      steps.map((step) => step.started_at),
      steps.map((step) => step.finished_at),
      // A step that has only begun is no checkpoint.
      steps.some((step) => step.finished_at !== null) ? 'on' : 'off',
      steps.map((step) => step.fence),
      steps.map((step) => step.logged),
    ];
    await retryWhileUnavailable(() => this.pool.query({ ...SAVE, values }), {
      signal: this.shutdown.signal,
      onRetry: (error) => this.logger.warn(error),
    });
    return saves.map(() => undefined);
  }
}

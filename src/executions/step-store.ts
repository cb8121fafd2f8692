import { Injectable, Logger } from '@nestjs/common';
import type { OnApplicationShutdown } from '@nestjs/common';
import { Pool } from 'pg';
import { GroupCommit } from '../database/group-commit.js';
import type { Step } from '../database/entities/step.entity.js';
import { BUSY } from '../database/isolated-writes.js';
import { queryLarge } from '../database/query-at-length.js';
import { storableText } from '../database/storable-text.js';
import { joinRows, jsonOf } from '../database/text-parameter.js';
import type { TextParameter } from '../database/text-parameter.js';
import { ClosedError } from '../database/unavailable.js';
import { Metrics } from '../metrics.js';

/**
 * Only the current attempt of an execution gets in, as its fence ($13) tells: the share lock makes a newer one wait for this
 * statement, and this statement see the newer one. $12 says whether the commit waits for the disk. The log must go as far as
 * when the step ended ($14): if PostgreSQL crashed and lost what its agent said, the step has to run again.
 * The outputs come last: pg would copy a long parameter again for each that follows.
 */
const SAVE = {
  name: 'step-save',
  text: `
    WITH durability AS MATERIALIZED (SELECT set_config('synchronous_commit', $12, true))
    INSERT INTO step (step_id, execution_id, agent_id, status, attempt, output, error, code, input_tokens, output_tokens,
                      started_at, finished_at)
    SELECT item.step_id, execution_id, item.agent_id, item.status, item.attempt, nullif(item.output, '')::json, item.error,
           item.code, item.input_tokens, item.output_tokens, item.started_at, item.finished_at
      FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::int[], $6::text[], $7::text[], $8::int[], $9::int[],
                  $10::timestamptz[], $11::timestamptz[], $13::int[], $14::int[], string_to_array($15, E'\\x1e'))
             AS item (step_id, execution_id, agent_id, status, attempt, error, code, input_tokens, output_tokens,
                      started_at, finished_at, fence, logged, output)
      JOIN execution USING (execution_id, fence), durability
     WHERE item.logged <= coalesce((SELECT last_sequence FROM execution_chunk
                                     WHERE execution_chunk.execution_id = item.execution_id
                                     ORDER BY first_sequence DESC LIMIT 1), 0)
       FOR SHARE OF execution SKIP LOCKED
        ON CONFLICT (execution_id, agent_id) DO UPDATE SET
           status = excluded.status, attempt = excluded.attempt, output = excluded.output, error = excluded.error,
           code = excluded.code, input_tokens = excluded.input_tokens, output_tokens = excluded.output_tokens,
           started_at = excluded.started_at, finished_at = excluded.finished_at
    RETURNING step_id`,
};

/** Of steps that were left out, those that could be written now: somebody held a lock on their execution. */
const UNSAVED = {
  name: 'step-unsaved',
  text: `
    SELECT item.step_id FROM unnest($1::uuid[], $2::uuid[], $3::int[], $4::int[]) AS item (step_id, execution_id, fence, logged)
      JOIN execution USING (execution_id, fence)
     WHERE item.logged <= coalesce((SELECT last_sequence FROM execution_chunk
                                     WHERE execution_chunk.execution_id = item.execution_id
                                     ORDER BY first_sequence DESC LIMIT 1), 0)`,
};

/** What makes a step one of the attempt that owns the execution. */
export interface StepOwner {
  fence: number;
  /** Sequence of the last chunk that was in the log when the step ended; 0 for one that has only begun. */
  logged: number;
}

type StepRow = Pick<Step, 'step_id'>;

/** `json` is the output as JSON; empty if there is none. */
type Save = Step & StepOwner & { json: TextParameter };

/** Writes steps, those of all executions that change in the same moment in one statement. */
@Injectable()
export class StepStore implements OnApplicationShutdown {
  private readonly logger = new Logger(StepStore.name);
  private readonly shutdown = new AbortController();
  private readonly saves: GroupCommit<Save, void>;

  constructor(
    private readonly pool: Pool,
    metrics: Metrics,
  ) {
    this.saves = new GroupCommit<Save, void>((steps) => this.write(steps), {
      bytesOf: ({ json }) => Buffer.byteLength(json),
      keyOf: ({ step_id, fence }) => `${step_id}:${fence}`,
      patience: { signal: this.shutdown.signal, onRetry: (error) => this.logger.warn(error) },
      onSplit: () => metrics.splitGroups.inc({ statement: 'step' }),
    });
  }

  onApplicationShutdown(): void {
    this.shutdown.abort(new ClosedError('The step store is closed.'));
  }

  /**
   * Resolves after the commit, however long the database is away, or when a newer attempt shuts this one out. Saves of the same
   * step keep their order. Rejects if this step can't be written.
   */
  async save(step: Step, owner: StepOwner): Promise<void> {
    const json = step.output === null ? '' : await jsonOf(step.output);
    return this.saves.add({ ...step, ...owner, json });
  }

  private async write(steps: Save[]): Promise<(void | typeof BUSY)[]> {
    const step_ids = steps.map((step) => step.step_id);
    const execution_ids = steps.map((step) => step.execution_id);
    const fences = steps.map((step) => step.fence);
    const logged = steps.map((step) => step.logged);
    const values = [
      step_ids,
      execution_ids,
      steps.map((step) => step.agent_id),
      steps.map((step) => step.status),
      steps.map((step) => step.attempt),
      steps.map((step) => (step.error === null ? null : storableText(step.error))),
      steps.map((step) => step.code),
      steps.map((step) => step.input_tokens),
      steps.map((step) => step.output_tokens),
      steps.map((step) => step.started_at),
      steps.map((step) => step.finished_at),
      // A step that has only begun is no checkpoint.
      steps.some((step) => step.finished_at !== null) ? 'on' : 'off',
      fences,
      logged,
      joinRows(steps.map((step) => step.json)),
    ];
    const { rows: saved } = await queryLarge<StepRow>(this.pool, { ...SAVE, values });
    if (saved.length === steps.length) return steps.map(() => undefined);
    const left = await this.pool.query<StepRow>({
      ...UNSAVED,
      values: [step_ids, execution_ids, fences, logged],
    });
    const locked = new Set(left.rows.map(({ step_id }) => step_id));
    saved.forEach(({ step_id }) => locked.delete(step_id));
    return step_ids.map((stepId) => (locked.has(stepId) ? BUSY : undefined));
  }
}

import { Injectable, Logger } from '@nestjs/common';
import type { OnApplicationShutdown } from '@nestjs/common';
import { Pool } from 'pg';
import type { Execution } from '../database/entities/execution.entity.js';
import { Notifications } from '../database/notifications.js';
import { Metrics } from '../metrics.js';
import { Repeat } from '../repeat.js';

/** Where it is said which execution is to be cancelled, with its id. */
const CANCEL_CHANNEL = 'agent_studio_cancel';
/** How often a worker looks for that in case a notification was lost, and for executions that lost their last subscriber. */
const CANCEL_POLL_MS = 500;
/** How long an execution that is to be cancelled without subscribers waits for one, where its deployment says nothing. */
const DISCONNECT_GRACE_MS = 5000;

const CANCELLED = {
  name: 'execution-cancelled',
  text: `
    SELECT execution_id FROM execution JOIN unnest($1::uuid[], $2::int[]) AS run (execution_id, grace_ms) USING (execution_id)
     WHERE cancel_requested_at IS NOT NULL
        OR grace_ms IS NOT NULL AND (
             SELECT sum(count) = 0 AND greatest(max(left_at), $3) < now() - grace_ms * interval '1 ms'
               FROM execution_subscriber WHERE execution_subscriber.execution_id = execution.execution_id)`,
};

interface Run {
  controller: AbortController;
  /** How long it goes on without a subscriber, in ms; without end if null. */
  graceMs: number | null;
}

/** The reason of a run's signal when a client cancelled it, or the last one left that it was run for. */
export class CancelledError extends Error {
  override name = 'CancelledError';
}

/** The executions that this process runs, and the way to stop one. */
@Injectable()
export class RunningExecutions implements OnApplicationShutdown {
  private readonly logger = new Logger(RunningExecutions.name);
  private readonly runs = new Map<string, Run>();
  /** Before it, clients may not have found this server: nobody counts as missing for longer. */
  private readonly startedAt = new Date();
  private readonly polls = new Repeat(
    async () => {
      await this.findCancelled();
      if (this.runs.size === 0) return false;
    },
    { everyMs: CANCEL_POLL_MS, onError: (error) => this.logger.warn(error) },
  );

  constructor(
    private readonly pool: Pool,
    private readonly metrics: Metrics,
    private readonly notifications: Notifications,
  ) {
    notifications.listen(CANCEL_CHANNEL, { onNotification: (executionId) => this.stop(executionId) });
  }

  /** Late: what still runs during the shutdown can be cancelled. */
  onApplicationShutdown(): void {
    void this.polls.stop();
  }

  /** Makes a run known until `remove`; the signal aborts with a {@link CancelledError}. */
  add({ execution_id, cancel_requested_at }: Execution): AbortSignal {
    const controller = new AbortController();
    this.runs.set(execution_id, { controller, graceMs: null });
    if (cancel_requested_at) this.stop(execution_id);
    this.metrics.runningExecutions.set(this.runs.size);
    this.polls.start();
    return controller.signal;
  }

  /** Stops the run once all its subscribers have been gone for `graceMs`. One that never had a subscriber goes on. */
  async cancelWhenAbandoned(executionId: string, graceMs = DISCONNECT_GRACE_MS): Promise<void> {
    const run = this.runs.get(executionId);
    if (!run) return;
    run.graceMs = graceMs;
    await this.findCancelled([[executionId, run]]); // it may have been so before it was taken up
  }

  /** `signal` is what {@link add} gave: another attempt in this process may have taken the place. */
  remove(executionId: string, signal: AbortSignal): void {
    if (this.runs.get(executionId)?.controller.signal === signal) this.runs.delete(executionId);
    this.metrics.runningExecutions.set(this.runs.size);
  }

  /** Stops runs, whichever process has them: if the notification gets lost, that one finds the request in the database. */
  cancel(executionIds: string[]): void {
    if (executionIds.length === 0) return;
    executionIds.forEach((executionId) => this.stop(executionId));
    this.notifications.send(CANCEL_CHANNEL, executionIds).catch((error: unknown) => this.logger.debug(error));
  }

  private stop(executionId: string): void {
    this.runs.get(executionId)?.controller.abort(new CancelledError('The execution was cancelled.'));
  }

  private async findCancelled(runs = [...this.runs]): Promise<void> {
    if (runs.length === 0) return;
    const { rows } = await this.pool.query<{ execution_id: string }>({
      ...CANCELLED,
      values: [runs.map(([id]) => id), runs.map(([, { graceMs }]) => graceMs), this.startedAt],
    });
    rows.forEach((row) => this.stop(row.execution_id));
  }
}

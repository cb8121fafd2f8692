import { setTimeout as sleep } from 'node:timers/promises';
import { Injectable, Logger } from '@nestjs/common';
import { Pool } from 'pg';
import { validate as isUuid } from 'uuid';
import type { Execution } from '../database/entities/execution.entity.js';
import { retryWhileUnavailable } from '../database/unavailable.js';
import { ExecutionQueue, PutOffError } from '../queue/execution-queue.js';
import { LostExecutions } from './lost-executions.js';
import { IS_FINAL, IS_QUEUED, IS_RUNNING, QUEUED, RUNNING } from './status.js';
import { WorkerLeases } from './worker-leases.js';

/**
 * A job can be faster than the commit of its execution. After so many ms there is no such execution, or it is queued once more by
 * whoever commits it.
 */
export const ROW_WAIT_MS = 300;
/** How soon a worker looks again: that commit is a matter of a millisecond, or the database is slow. */
const FIRST_ROW_POLL_MS = 1;
const LAST_ROW_POLL_MS = 100;

/**
 * Takes an execution that waits: from here on `fence` is its fencing token, and an older attempt can write nothing. It is random
 * and not the number of the attempt, which comes again if PostgreSQL crashes before the claim is on its disk. The lease of the
 * process has to be in force. The commit does not wait for the disk, since nobody was told of it: were it lost, the execution
 * would be claimed again. Nor did that of its admission: it counts as admitted from here on in any case.
 */
const CLAIM = {
  name: 'execution-claim',
  text: `
    WITH relaxed AS MATERIALIZED (
      SELECT set_config('synchronous_commit', 'off', true), 1 + (random() * 2147483646)::int AS fence)
    UPDATE execution SET status = ${RUNNING}, held = false, admitted = true, attempt = attempt + 1,
           fence = relaxed.fence, leased_fence = relaxed.fence, worker_id = $2,
           losses = losses + lost_attempts, lost_attempts = 0, started_at = coalesce(started_at, now())
      FROM relaxed
     WHERE execution_id = $1 AND status ${IS_QUEUED} AND ($3 OR losses + lost_attempts < 2)
       AND EXISTS (SELECT 1 FROM worker_lease WHERE worker_lease.worker_id = $2 AND worker_lease.lost_at IS NULL)
    RETURNING execution.*, extract(epoch FROM now() - started_at)::float8 * 1000 AS spent_ms`,
};

/** Why an execution was not to be had. */
const STANDING = {
  name: 'execution-standing',
  text: `
    SELECT status ${IS_FINAL} AS ended, status ${IS_RUNNING} AS running, losses + lost_attempts >= 2 AS suspect,
           EXISTS (SELECT 1 FROM worker_lease WHERE worker_lease.worker_id = execution.worker_id
                      AND worker_lease.lost_at IS NULL) AND leased_fence = fence AS leased,
           EXISTS (SELECT 1 FROM worker_lease WHERE worker_lease.worker_id = $2
                      AND worker_lease.lost_at IS NULL) AS in_force
      FROM execution WHERE execution_id = $1`,
};

/** Says that another worker may go on, and that this one was not lost. Nothing, if the execution is not this attempt's any more. */
const HAND_BACK = {
  name: 'execution-hand-back',
  text: `UPDATE execution SET status = ${QUEUED} WHERE execution_id = $1 AND fence = $2 AND status ${IS_RUNNING}`,
};

interface Standing {
  ended: boolean;
  running: boolean;
  suspect: boolean;
  leased: boolean;
  in_force: boolean;
}

/** An execution as its worker has taken it. */
export type ClaimedExecution = Execution & {
  /** ms since it was taken up for the first time, by the database's clock. */
  spent_ms: number;
};

/**
 * Takes executions up for this process, and hands them back. Of suspects, which lost two workers in a row, it has one at a time: if
 * the process is lost then, that one is the likely reason, and no other.
 */
@Injectable()
export class Claims {
  private readonly logger = new Logger(Claims.name);
  private suspect: ClaimedExecution | 'being claimed' | undefined;

  constructor(
    private readonly pool: Pool,
    private readonly queue: ExecutionQueue,
    private readonly leases: WorkerLeases,
    private readonly lost: LostExecutions,
  ) {}

  /**
   * Undefined if there is nothing to run: it has ended, never was, or another process has it. Rejects with a {@link PutOffError} for
   * a suspect while this process has another one, with the reason of `letGo`, and as pg does.
   */
  async claim(executionId: string, letGo: AbortSignal): Promise<ClaimedExecution | undefined> {
    if (!isUuid(executionId)) return undefined;
    const giveUp = performance.now() + ROW_WAIT_MS;
    for (let delay = FIRST_ROW_POLL_MS; ; delay = Math.min(delay * 1.5, LAST_ROW_POLL_MS)) {
      const workerId = await this.leases.current();
      const execution = await this.take(executionId, workerId, false);
      if (execution) return execution;
      const standing = await this.standing(executionId, workerId);
      if (!standing) {
        if (performance.now() > giveUp) {
          this.logger.warn({ execution_id: executionId }, 'A job without an execution was dropped.');
          return undefined;
        }
      } else if (standing.ended || (standing.running && standing.leased)) {
        return undefined;
      } else if (standing.running) {
        await this.lost.takeBack([executionId]);
      } else if (!standing.in_force) {
        this.leases.renounce(workerId);
      } else if (standing.suspect) {
        const suspect = await this.takeSuspect(executionId, workerId);
        if (suspect) return suspect;
      }
      await sleep(delay, undefined, { signal: letGo }).catch(() => letGo.throwIfAborted());
    }
  }

  /** @returns whether the execution was still this attempt's. If the database is away until `signal` aborts, its worker counts as lost. */
  async handBack({ execution_id, fence }: Execution, signal: AbortSignal): Promise<boolean> {
    try {
      const { rowCount } = await retryWhileUnavailable(
        () => this.pool.query({ ...HAND_BACK, values: [execution_id, fence] }),
        { signal, onRetry: (error) => this.logger.debug(error) },
      );
      return rowCount === 1;
    } catch (error) {
      this.logger.warn(error);
      return true;
    }
  }

  /** To be called once this process is done with an execution that it took up. */
  release(execution: ClaimedExecution): void {
    if (this.suspect !== execution) return;
    this.suspect = undefined;
    this.queue.resume();
  }

  private async takeSuspect(executionId: string, workerId: string): Promise<ClaimedExecution | undefined> {
    if (this.suspect) throw new PutOffError('This process runs another suspect.');
    this.suspect = 'being claimed';
    try {
      const execution = await this.take(executionId, workerId, true);
      this.suspect = execution;
      return execution;
    } catch (error) {
      this.suspect = undefined;
      throw error;
    }
  }

  private async take(
    executionId: string,
    workerId: string,
    isSuspect: boolean,
  ): Promise<ClaimedExecution | undefined> {
    const values = [executionId, workerId, isSuspect];
    const { rows } = await this.pool.query<ClaimedExecution>({ ...CLAIM, values });
    return rows[0];
  }

  private async standing(executionId: string, workerId: string): Promise<Standing | undefined> {
    const { rows } = await this.pool.query<Standing>({ ...STANDING, values: [executionId, workerId] });
    return rows[0];
  }
}

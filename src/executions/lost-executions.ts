import { Inject, Injectable, Logger } from '@nestjs/common';
import type { OnApplicationBootstrap, OnModuleDestroy } from '@nestjs/common';
import { Pool } from 'pg';
import { validate as isUuid } from 'uuid';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { isUnavailable } from '../database/unavailable.js';
import { Metrics } from '../metrics.js';
import { ExecutionQueue } from '../queue/execution-queue.js';
import { Repeat } from '../repeat.js';
import { IS_COMPLETED, IS_RUNNING, QUEUED } from './status.js';
import { Stillness } from './stillness.js';
import { LONGEST_GAP } from './worker-leases.js';

/** How often the deliveries of the queue are looked at within the time of a lease. */
const LOOKS = 4;
/** For how long it is remembered that a process was lost. */
const REMEMBERED_MS = 3_600_000;

/**
 * Takes executions back from processes that are lost, or, of those that are named, from processes of an earlier build, which have
 * no lease. Progress begins the count anew: what comes to the end of a step is not what stops its workers. A loss counts if
 * nothing else explains it: the process ran this suspect and no other, and since the loss before no process was lost that
 * ran none, as they are when somebody kills processes. Two processes that do this at once find what the other one has done.
 */
const TAKE_BACK = {
  name: 'execution-take-back',
  text: `
    WITH relaxed AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true)), lost AS MATERIALIZED (
      SELECT execution_id, fence,
             EXISTS (SELECT 1 FROM step WHERE step.execution_id = execution.execution_id
                        AND step.attempt = execution.attempt AND step.status ${IS_COMPLETED}) AS progressed,
             leased_fence IS NOT DISTINCT FROM fence AND losses >= 2
               AND count(*) FILTER (WHERE losses >= 2 AND leased_fence = fence) OVER (PARTITION BY worker_id) = 1
               AND NOT EXISTS (SELECT 1 FROM worker_lease WHERE worker_lease.lost_at > execution.lost_at
                                  AND NOT ran_suspect AND worker_lease.worker_id <> execution.worker_id) AS counts
        FROM execution
       WHERE status ${IS_RUNNING}
         AND CASE WHEN leased_fence IS NOT DISTINCT FROM fence
                  THEN NOT EXISTS (SELECT 1 FROM worker_lease
                                    WHERE worker_lease.worker_id = execution.worker_id AND worker_lease.lost_at IS NULL)
                  ELSE execution_id = ANY ($1::uuid[]) END
    )
    UPDATE execution SET status = ${QUEUED}, lost_at = clock_timestamp(), lost_attempts = 0,
           losses = CASE WHEN progressed THEN 1 ELSE losses + lost_attempts + 1 END,
           counted_losses = CASE WHEN progressed THEN 0 WHEN counts THEN counted_losses + 1 ELSE counted_losses END
      FROM lost, relaxed
     WHERE execution.execution_id = lost.execution_id AND execution.fence = lost.fence AND status ${IS_RUNNING}
    RETURNING execution.execution_id, losses, counted_losses`,
};

/** Which of some executions no process has by a lease. */
const WITHOUT_LEASE = {
  name: 'execution-without-lease',
  text: `
    SELECT execution_id FROM unnest($1::uuid[]) AS delivered (execution_id)
     WHERE NOT EXISTS (SELECT 1 FROM execution WHERE execution.execution_id = delivered.execution_id
                          AND status ${IS_RUNNING} AND leased_fence = fence)`,
};

const FORGET = `DELETE FROM worker_lease WHERE lost_at < now() - $1 * interval '1 ms'`;

interface Lost {
  execution_id: string;
  losses: number;
  counted_losses: number;
}

/** Brings executions whose worker is lost back to the head of the queue. Every worker does it. */
@Injectable()
export class LostExecutions implements OnApplicationBootstrap, OnModuleDestroy {
  private readonly logger = new Logger(LostExecutions.name);
  private readonly undelivered: Stillness;
  private readonly looks: Repeat;

  constructor(
    @Inject(CONFIG) private readonly config: Pick<ServerConfig, 'JOB_LOCK_MS' | 'ROLE'>,
    private readonly pool: Pool,
    private readonly queue: ExecutionQueue,
    private readonly metrics: Metrics,
  ) {
    this.undelivered = new Stillness(config.JOB_LOCK_MS * LONGEST_GAP);
    this.looks = new Repeat(() => this.look(), {
      everyMs: config.JOB_LOCK_MS / LOOKS,
      onError: (error) => {
        this.undelivered.forget();
        this.logger[isUnavailable(error) ? 'debug' : 'warn'](error);
      },
    });
  }

  onApplicationBootstrap(): void {
    if (this.config.ROLE !== 'api') this.looks.start();
  }

  onModuleDestroy(): void {
    void this.looks.stop(); // a Redis that is away answers when it is back
  }

  /**
   * Takes back what lost processes had, and those executions of an earlier build's processes that are named. Rejects as pg does;
   * what the queue did not take is found again by {@link look}.
   */
  async takeBack(ofEarlierBuild: string[] = []): Promise<void> {
    const { rows } = await this.pool.query<Lost>({ ...TAKE_BACK, values: [ofEarlierBuild] });
    for (const { execution_id, losses, counted_losses } of rows) {
      this.metrics.lostWorkers.inc();
      const fields = { execution_id, losses, counted_losses };
      this.logger.warn(fields, 'The worker of an execution was lost; another one goes on.');
    }
    await this.queue.requeue(rows.map(({ execution_id }) => execution_id));
  }

  /** Takes back what was missed when a process was found lost: a claim that was committed in that moment. */
  async sweep(): Promise<void> {
    await this.takeBack();
    await this.pool.query(FORGET, [REMEMBERED_MS]);
  }

  /**
   * Puts back what the queue has handed to a process that died before it took it up, or that is of an earlier build, which has no
   * lease: it renews its lock instead. A worker that only was slow finds the execution in another one's hands.
   */
  private async look(): Promise<void> {
    const deliveries = (await this.queue.deliveries()).filter(({ executionId }) => isUuid(executionId));
    if (deliveries.length === 0) return this.undelivered.forget();
    const { rows } = await this.pool.query<{ execution_id: string }>({
      ...WITHOUT_LEASE,
      values: [deliveries.map(({ executionId }) => executionId)],
    });
    const unheld = new Set(rows.map(({ execution_id }) => execution_id));
    const signs = deliveries.filter(({ executionId }) => unheld.has(executionId));
    const still = this.undelivered.look(new Map(signs.map(({ executionId, sign }) => [executionId, sign])));
    const dead = [...still]
      .filter(([, ms]) => ms > this.config.JOB_LOCK_MS)
      .map(([executionId]) => executionId);
    if (dead.length === 0) return;
    await this.takeBack(dead);
    await this.queue.requeue(dead);
  }
}

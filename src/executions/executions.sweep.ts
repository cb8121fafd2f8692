import { Inject, Injectable, Logger } from '@nestjs/common';
import type { OnApplicationBootstrap, OnModuleDestroy } from '@nestjs/common';
import { Pool } from 'pg';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { ExecutionQueue } from '../queue/execution-queue.js';
import { Repeat } from '../repeat.js';
import { StatusEvents } from '../status-events/status-events.js';
import { ExecutionEnds } from './ends.js';
import { LostExecutions } from './lost-executions.js';
import { Retention } from './retention.js';
import { Subscribers } from './subscribers.js';
import { IS_QUEUED, IS_RUNNING, IS_UNFINISHED } from './status.js';

const SWEEP_MS = 10_000;
/** Soon after the start: perhaps the whole system was down. */
const FIRST_SWEEP_MS = 1000;
const PAGE = 500;
/** Between two searches for steps that were left running. */
const CLOSE_STEPS_MS = 3_600_000;

/** How many executions must be in the queue. */
const COUNT_UNFINISHED = {
  name: 'execution-count-unfinished',
  text: `SELECT count(*)::int AS unfinished FROM execution WHERE admitted AND status ${IS_UNFINISHED}`,
};

/**
 * Executions that must be in the queue, the oldest first, but for those whose way into it may take a moment still, and for those
 * that a process has by its lease. The clock of the process that accepted one may be wrong.
 */
const UNFINISHED = {
  name: 'execution-unfinished',
  text: `
    SELECT execution_id FROM execution
     WHERE admitted AND (status ${IS_QUEUED} OR status ${IS_RUNNING} AND leased_fence IS DISTINCT FROM fence)
       AND abs(extract(epoch FROM now() - created_at)) * 1000 > $1
       AND ($2::uuid IS NULL OR execution_id > $2)
     ORDER BY execution_id LIMIT $3`,
};

/** Mends every few seconds what a process that died, or a queue that was emptied, left behind, and deletes what is old. Every worker does it. */
@Injectable()
export class ExecutionsSweep implements OnApplicationBootstrap, OnModuleDestroy {
  private readonly logger = new Logger(ExecutionsSweep.name);
  private nextCloseAt = -Infinity;
  /** Two, so that a queue that is away holds up nothing else. */
  private readonly sweeps = [
    this.sweep(
      () => this.lost.sweep(),
      (signal) => this.requeueLost(signal),
    ),
    this.sweep(
      () => this.subscribers.forgetDead(),
      () => this.statusEvents.number(),
      (signal) => this.retention.expire(signal),
      (signal) => this.closeLeftSteps(signal),
    ),
  ];

  constructor(
    @Inject(CONFIG) private readonly config: ServerConfig,
    private readonly pool: Pool,
    private readonly queue: ExecutionQueue,
    private readonly lost: LostExecutions,
    private readonly subscribers: Subscribers,
    private readonly statusEvents: StatusEvents,
    private readonly retention: Retention,
    private readonly ends: ExecutionEnds,
  ) {}

  onApplicationBootstrap(): void {
    if (this.config.ROLE !== 'api') this.sweeps.forEach((sweep) => sweep.start(FIRST_SWEEP_MS));
  }

  onModuleDestroy(): void {
    for (const sweep of this.sweeps) void sweep.stop();
  }

  /** One task that fails keeps none of the others from being done. */
  private sweep(...tasks: ((signal: AbortSignal) => Promise<void>)[]): Repeat {
    const sweepOnce = async (signal: AbortSignal) => {
      for (const task of tasks) {
        if (signal.aborted) return;
        await task(signal).catch((error: unknown) => this.logger.warn(error));
      }
    };
    return new Repeat(sweepOnce, { everyMs: SWEEP_MS, onError: (error) => this.logger.error(error) });
  }

  /** The whole table is looked through, so seldom: as long as processes of an earlier build run beside, there may be new ones. */
  private async closeLeftSteps(signal: AbortSignal): Promise<void> {
    if (performance.now() < this.nextCloseAt) return;
    this.nextCloseAt = performance.now() + CLOSE_STEPS_MS; // also if it fails: it may be because the table is so large
    await this.ends.closeLeftSteps(signal);
  }

  /**
   * Puts unfinished executions that the queue has lost back into it; those that are in it, or that a worker has, stay where
   * they are.
   */
  private async requeueLost(signal: AbortSignal): Promise<void> {
    const { rows } = await this.pool.query<{ unfinished: number }>(COUNT_UNFINISHED);
    const { waiting, active } = await this.queue.size();
    // All of them, if the queue was emptied; else the oldest, since it may hold some that have ended just now.
    const isComplete = waiting + active >= (rows[0]?.unfinished ?? 0);
    let last: string | undefined;
    do {
      const values = [SWEEP_MS, last, PAGE];
      const { rows: page } = await this.pool.query<{ execution_id: string }>({ ...UNFINISHED, values });
      if (page.length > 0) await this.queue.add(page.map(({ execution_id }) => execution_id));
      last = page.length === PAGE ? page.at(-1)?.execution_id : undefined;
    } while (last !== undefined && !isComplete && !signal.aborted);
  }
}

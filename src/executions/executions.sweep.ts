import { Inject, Injectable, Logger } from '@nestjs/common';
import type { OnApplicationBootstrap, OnModuleDestroy } from '@nestjs/common';
import { Pool } from 'pg';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { ExecutionQueue } from '../queue/execution-queue.js';
import { StatusEvents } from '../status-events/status-events.js';
import { Retention } from './retention.js';
import { Subscribers } from './subscribers.js';

const SWEEP_MS = 10_000;
const SWEEP_ROWS = 500;

/** Accepted executions that are not in the queue, and how old they must be to count as lost. */
const LOST = {
  name: 'execution-lost',
  text: `
    SELECT execution_id FROM execution
     WHERE (status = 'queued' AND created_at < now() - $1 * interval '1 ms')
        OR (status = 'running' AND started_at < now() - 6 * $1 * interval '1 ms')
     ORDER BY execution_id LIMIT $2`,
};

/** Mends every few seconds what a process that died, or a queue that was emptied, left behind, and deletes what is old. Every worker does it. */
@Injectable()
export class ExecutionsSweep implements OnApplicationBootstrap, OnModuleDestroy {
  private readonly logger = new Logger(ExecutionsSweep.name);
  private readonly shutdown = new AbortController();
  private timer: NodeJS.Timeout | undefined;

  constructor(
    @Inject(CONFIG) private readonly config: ServerConfig,
    private readonly pool: Pool,
    private readonly queue: ExecutionQueue,
    private readonly subscribers: Subscribers,
    private readonly statusEvents: StatusEvents,
    private readonly retention: Retention,
  ) {}

  onApplicationBootstrap(): void {
    if (this.config.ROLE !== 'api') this.schedule();
  }

  onModuleDestroy(): void {
    this.shutdown.abort();
    clearTimeout(this.timer);
  }

  private schedule(): void {
    this.timer = setTimeout(() => {
      void this.sweep().finally(() => this.shutdown.signal.aborted || this.schedule());
    }, SWEEP_MS);
  }

  private async sweep(): Promise<void> {
    const tasks = [
      () => this.requeueLost(),
      () => this.subscribers.forgetDead(),
      () => this.statusEvents.number(),
      () => this.retention.expire(this.shutdown.signal),
    ];
    // One that fails keeps none of the others from being done.
    for (const task of tasks) {
      if (this.shutdown.signal.aborted) return;
      await task().catch((error: unknown) => this.logger.warn(error));
    }
  }

  /** Puts unfinished executions that the queue has lost back into it; those that are in it stay where they are. */
  private async requeueLost(): Promise<void> {
    const { rows } = await this.pool.query<{ execution_id: string }>({
      ...LOST,
      values: [SWEEP_MS, SWEEP_ROWS],
    });
    for (const { execution_id } of rows) await this.queue.add(execution_id);
  }
}

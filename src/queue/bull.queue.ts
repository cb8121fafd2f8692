import { setTimeout as sleep } from 'node:timers/promises';
import { Inject, Injectable, Logger } from '@nestjs/common';
import { Queue, WaitingError, Worker, createPostgresBackend, createRedisBackend } from 'bullmq';
import type { BackendFactory, ConnectionOptions, IQueueBackend, Job } from 'bullmq';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { ExecutionQueue, LockLostError } from './execution-queue.js';
import type { ExecutionHandler } from './execution-queue.js';

const QUEUE_NAME = 'executions';
/** Connections of the producer's pool and of the worker's. */
const POOL_SIZE = 4;
/** Before an execution that met a defect, or a database that is away, is handed to a worker again. */
const RETRY_DELAY_MS = 1000;
/** BullMQ shall never give an execution up: its end has to be written into its log, which the handler does. */
const MOST_STALLS = 1_000_000;

/**
 * BullMQ, on PostgreSQL or, with `REDIS_URL`, on Redis. A job is only the hint that an execution wants a worker: its id
 * is the execution's, and what is true about the execution stands in the database. That is why the queue's own
 * statements need not wait for the disk.
 */
@Injectable()
export class BullQueue extends ExecutionQueue {
  private readonly logger = new Logger(BullQueue.name);
  private readonly connection: ConnectionOptions;
  private readonly backend: BackendFactory<IQueueBackend, ConnectionOptions>;
  private readonly queue: Queue<unknown, unknown, string, unknown, unknown, string, IQueueBackend>;
  private worker: Worker<unknown, unknown, string, IQueueBackend> | undefined;

  constructor(@Inject(CONFIG) private readonly config: ServerConfig) {
    super();
    this.connection = { url: config.REDIS_URL };
    this.backend = config.REDIS_URL ? createRedisBackend : postgresBackend(config.DATABASE_URL);
    this.queue = new Queue(
      QUEUE_NAME,
      {
        connection: this.connection,
        defaultJobOptions: { removeOnComplete: true, removeOnFail: true },
        // Nobody reads BullMQ's own event stream: the event log is what clients see.
        streams: { events: { maxLen: 100 } },
      },
      this.backend,
    );
    this.queue.on('error', (error) => this.logger.warn(error));
  }

  async add(executionId: string): Promise<void> {
    await this.queue.add('execution', {}, { jobId: executionId });
  }

  process(handler: ExecutionHandler, concurrency: number): void {
    const lock = this.config.JOB_LOCK_MS;
    this.worker = new Worker(
      QUEUE_NAME,
      (job, token, signal) => this.run(job, { token, signal, handler }),
      {
        connection: this.connection,
        concurrency,
        lockDuration: lock,
        lockRenewTime: lock / 2,
        stalledInterval: lock / 5,
        maxStalledCount: MOST_STALLS,
      },
      this.backend,
    );
    this.worker.on('error', (error) => this.logger.warn(error));
    this.worker.on('lockRenewalFailed', (executionIds) => {
      for (const executionId of executionIds)
        this.worker?.cancelJob(executionId, 'The lock of this execution was lost.');
    });
  }

  async depth(): Promise<number> {
    return this.queue.getWaitingCount();
  }

  async close(graceMs: number): Promise<void> {
    const { worker } = this;
    if (worker) {
      const deadline = setTimeout(() => worker.cancelAllJobs('This worker is shutting down.'), graceMs);
      await worker.close().finally(() => clearTimeout(deadline));
    }
    await this.queue.close();
  }

  private async run(
    job: Job,
    options: { token: string | undefined; signal: AbortSignal | undefined; handler: ExecutionHandler },
  ): Promise<void> {
    const { token, signal, handler } = options;
    if (!job.id || !signal) throw new Error('BullMQ handed over a job without an id or a signal.');
    const letGo = new AbortController();
    signal.addEventListener('abort', () => letGo.abort(new LockLostError(String(signal.reason))), {
      once: true,
    });
    try {
      await handler(job.id, letGo.signal);
    } catch (error) {
      if (!(error instanceof LockLostError)) {
        this.logger.error(error);
        await sleep(RETRY_DELAY_MS, undefined, { signal }).catch(() => undefined); // the shutdown ends the wait
      }
      // Back to the other workers, or to this one. If that fails too, the lock runs out, which has the same effect; what
      // must not happen is that BullMQ takes the job for failed and removes it.
      await job.moveToWait(token).catch((failure: unknown) => this.logger.warn(failure));
      throw new WaitingError();
    }
  }
}

function postgresBackend(connectionString: string): BackendFactory<IQueueBackend, ConnectionOptions> {
  return (name, options, kind) =>
    createPostgresBackend(
      name,
      {
        ...options,
        connection: { connectionString, migrate: true, max: POOL_SIZE, options: '-c synchronous_commit=off' },
      },
      kind,
    );
}

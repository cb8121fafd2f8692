import { setTimeout as sleep } from 'node:timers/promises';
import { Inject, Injectable, Logger } from '@nestjs/common';
import type { OnApplicationShutdown } from '@nestjs/common';
import { Queue, WaitingError, Worker, createPostgresBackend, createRedisBackend } from 'bullmq';
import type { BackendFactory, ConnectionOptions, IQueueBackend } from 'bullmq';
import { Pool } from 'pg';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { GroupCommit } from '../database/group-commit.js';
import { sessionConfig } from '../database/session.js';
import { readDeliveries } from './deliveries.js';
import { ExecutionQueue, LockLostError, PutOffError } from './execution-queue.js';
import type { Delivery, ExecutionHandler } from './execution-queue.js';

const QUEUE_NAME = 'executions';
const JOB_NAME = 'execution';
/** Connections of the producer's pool and of the worker's. */
const POOL_SIZE = 4;
/** ms to wait for the queue's size: for a Redis that is away, BullMQ waits without end. */
const SIZE_TIMEOUT_MS = 5000;
/** ms that a statement of the queue may take. */
const QUERY_TIMEOUT_MS = 10_000;
/** Before an execution that met a defect, or a database that is away, or was put off, is handed to a worker again. */
const RETRY_DELAY_MS = 1000;
/** Before a worker asks again after the queue's server did not answer as it should. */
const FETCH_RETRY_MS = 500;
/**
 * How long BullMQ's lock lasts: longer than any execution may take, so that it is never renewed, and that processes of an earlier
 * build, which search for locks that ran out, find none. Whether a worker lives is told by its lease.
 */
const LOCK_MS = 48 * 3_600_000;
/** For BullMQ, the one that may take a job from any worker. */
const ANY_TOKEN = '0';
const COUNTED = ['waiting', 'prioritized', 'delayed', 'active'] as const;

type Backend = IQueueBackend;
type CreateBackend = BackendFactory<Backend, ConnectionOptions>;

/**
 * BullMQ, on PostgreSQL or, with `REDIS_URL`, on Redis. A job is only the hint that an execution wants a worker: its id
 * is the execution's, and what is true about the execution stands in the database. That is why the queue's own
 * statements need not wait for the disk.
 */
@Injectable()
export class BullQueue extends ExecutionQueue implements OnApplicationShutdown {
  private readonly logger = new Logger(BullQueue.name);
  private readonly connection: ConnectionOptions;
  private readonly createBackend: CreateBackend;
  private readonly queue: Queue<unknown, unknown, string, unknown, unknown, string, Backend>;
  private worker: Worker<unknown, unknown, string, Backend> | undefined;
  private readonly running = new Set<AbortController>();
  private readonly putOff: Delivered[] = [];
  private resumption: NodeJS.Timeout | undefined;
  private abandoned: LockLostError | undefined;
  private stopping = false;
  private readonly additions = new GroupCommit<string, void>((jobIds) => this.addAll(jobIds));

  constructor(
    @Inject(CONFIG) config: ServerConfig,
    private readonly pool: Pool,
  ) {
    super();
    this.connection = { url: config.REDIS_URL };
    this.createBackend = config.REDIS_URL ? createRedisBackend : postgresBackend(config.DATABASE_URL);
    this.queue = new Queue(
      QUEUE_NAME,
      {
        connection: this.connection,
        defaultJobOptions: { removeOnComplete: true, removeOnFail: true },
        // Nobody reads BullMQ's own event stream: the event log is what clients see.
        streams: { events: { maxLen: 100 } },
      },
      this.createBackend,
    );
    this.queue.on('error', (error) => this.logger.warn(error));
  }

  async add(executionIds: string[]): Promise<void> {
    await Promise.all(executionIds.map((executionId) => this.additions.add(executionId)));
  }

  async remove(executionIds: string[]): Promise<void> {
    await Promise.all(executionIds.map((executionId) => this.queue.backend.remove(executionId, false)));
  }

  async requeue(executionIds: string[]): Promise<void> {
    await Promise.all(
      executionIds.map((executionId) => this.handBack({ jobId: executionId, token: ANY_TOKEN })),
    );
  }

  deliveries(): Promise<Delivery[]> {
    return readDeliveries(this.queue.backend, QUEUE_NAME, this.pool);
  }

  process(handler: ExecutionHandler, concurrency: number): void {
    this.worker = new Worker(
      QUEUE_NAME,
      async (job, token) => {
        if (!job.id || !token) throw new Error('BullMQ handed over a job without an id or a lock.');
        await this.run({ jobId: job.id, token }, handler);
      },
      {
        connection: this.connection,
        concurrency,
        lockDuration: LOCK_MS,
        skipLockRenewal: true,
        skipStalledCheck: true,
        runRetryDelay: FETCH_RETRY_MS,
      },
      (name, options, kind) => unhurried(this.createBackend(name, options, kind)),
    );
    this.worker.on('error', (error) => this.logger.warn(error));
  }

  resume(): void {
    const [oldest] = this.putOff.splice(0, 1);
    if (oldest) void this.handBack(oldest);
  }

  async size(): Promise<{ waiting: number; active: number }> {
    const answered = new AbortController();
    const tooLate = sleep(SIZE_TIMEOUT_MS, undefined, answered).then(() => {
      throw new Error(`The queue's server did not answer within ${SIZE_TIMEOUT_MS} ms.`);
    });
    try {
      const counts = await Promise.race([this.queue.getJobCounts(...COUNTED), tooLate]);
      const { waiting = 0, prioritized = 0, delayed = 0, active = 0 } = counts;
      return { waiting: waiting + prioritized + delayed, active };
    } finally {
      tooLate.catch(() => undefined); // the abort
      answered.abort();
    }
  }

  async stop(graceMs: number): Promise<void> {
    this.stopping = true;
    clearTimeout(this.resumption);
    const deadline = setTimeout(() => {
      this.abandoned = new LockLostError('This worker is shutting down.');
      for (const controller of this.running) controller.abort(this.abandoned);
    }, graceMs);
    const closed = this.worker?.close();
    await Promise.all(this.putOff.splice(0).map((delivered) => this.handBack(delivered)));
    await closed;
    clearTimeout(deadline);
  }

  /** Late: until the HTTP server has closed, it accepts executions, and they want to get into the queue. */
  async onApplicationShutdown(): Promise<void> {
    await this.queue.close();
  }

  private async addAll(jobIds: string[]): Promise<void[]> {
    const jobs = jobIds.map((jobId) => ({ name: JOB_NAME, data: {}, opts: { jobId } }));
    const [job] = jobs;
    // One alone, as most are: on PostgreSQL a batch takes some ms more.
    if (job && jobs.length === 1) await this.queue.add(job.name, job.data, job.opts);
    else await this.queue.addBulk(jobs);
    return jobIds.map(() => undefined);
  }

  private async run(delivered: Delivered, handler: ExecutionHandler): Promise<void> {
    const controller = new AbortController();
    if (this.abandoned) controller.abort(this.abandoned);
    this.running.add(controller);
    const { signal } = controller;
    try {
      await handler(delivered.jobId, signal);
    } catch (error) {
      if (error instanceof PutOffError && !this.stopping) {
        // It may be here already, from before others put it back.
        const earlier = this.putOff.findIndex(({ jobId }) => jobId === delivered.jobId);
        if (earlier >= 0) this.putOff.splice(earlier, 1);
        this.putOff.push(delivered);
        this.scheduleResumption();
      } else {
        if (!(error instanceof LockLostError || error instanceof PutOffError)) {
          this.logger.error(error);
          await sleep(RETRY_DELAY_MS, undefined, { signal }).catch(() => undefined); // the shutdown ends the wait
        }
        await this.handBack(delivered);
      }
      throw new WaitingError(); // BullMQ must not take the job for failed, and remove it
    } finally {
      this.running.delete(controller);
    }
  }

  /** One at a time: what many wait for is handed out again once in a while, not all of it each time. */
  private scheduleResumption(): void {
    this.resumption ??= setTimeout(() => {
      this.resumption = undefined;
      this.resume();
      if (this.putOff.length > 0) this.scheduleResumption();
    }, RETRY_DELAY_MS);
  }

  /** Back to the head of the queue. If the lock is another worker's, that one has it. */
  private async handBack({ jobId, token }: Delivered): Promise<void> {
    try {
      await this.queue.backend.retryJob(jobId, true, token);
    } catch (error) {
      this.logger.debug(error);
      // A queue that was emptied has no such job any more. One that is in it stays as it is.
      await this.queue
        .add(JOB_NAME, {}, { jobId, lifo: true })
        .catch((failure: unknown) => this.logger.warn(failure));
    }
  }
}

/** A job that BullMQ has handed to this process, with its lock. */
interface Delivered {
  jobId: string;
  token: string;
}

/** BullMQ asks again at once after most errors: a server that is just starting would be asked hundreds of times a second. */
function unhurried(backend: Backend): Backend {
  const moveToActive = backend.moveToActive.bind(backend);
  backend.moveToActive = async (token, name) => {
    try {
      return await moveToActive(token, name);
    } catch (error) {
      await sleep(FETCH_RETRY_MS);
      throw error;
    }
  };
  return backend;
}

function postgresBackend(connectionString: string): CreateBackend {
  const session = sessionConfig(connectionString, { kind: 'queue', statementMs: QUERY_TIMEOUT_MS });
  const connection = {
    ...session,
    options: `${session.options} -c synchronous_commit=off`, // BullMQ adds the search_path of its own schema
    migrate: true,
    max: POOL_SIZE,
  };
  return (name, options, kind) => createPostgresBackend(name, { ...options, connection }, kind);
}

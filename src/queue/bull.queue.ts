import { setTimeout as sleep } from 'node:timers/promises';
import { Inject, Injectable, Logger } from '@nestjs/common';
import type { OnApplicationShutdown } from '@nestjs/common';
import { Queue, WaitingError, Worker, createPostgresBackend, createRedisBackend } from 'bullmq';
import type { BackendFactory, ConnectionOptions, IQueueBackend } from 'bullmq';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { GroupCommit } from '../database/group-commit.js';
import { sessionConfig } from '../database/session.js';
import { Metrics } from '../metrics.js';
import { ExecutionQueue, LockLostError } from './execution-queue.js';
import type { ExecutionHandler } from './execution-queue.js';
import { JobLeases, roundMs } from './job-leases.js';
import type { JobLease } from './job-leases.js';

const QUEUE_NAME = 'executions';
const JOB_NAME = 'execution';
/** Connections of the producer's pool and of the worker's. */
const POOL_SIZE = 4;
/** ms to wait for the queue's size: for a Redis that is away, BullMQ waits without end. */
const SIZE_TIMEOUT_MS = 5000;
/** ms that a statement of the queue may take. */
const QUERY_TIMEOUT_MS = 10_000;
/** Before an execution that met a defect, or a database that is away, is handed to a worker again. */
const RETRY_DELAY_MS = 1000;
/** Before a worker asks again after the queue's server did not answer as it should. */
const FETCH_RETRY_MS = 500;
/** BullMQ shall never give an execution up: its end has to be written into its log, which the handler does. */
const MOST_STALLS = 1_000_000;
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
  private leases: JobLeases | undefined;
  private readonly additions = new GroupCommit<string, void>((jobIds) => this.addAll(jobIds));

  constructor(
    @Inject(CONFIG) private readonly config: ServerConfig,
    private readonly metrics: Metrics,
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

  process(handler: ExecutionHandler, concurrency: number): void {
    const lock = this.config.JOB_LOCK_MS;
    const createBackend: CreateBackend = (name, options, kind) => {
      const backend = unhurried(this.createBackend(name, options, kind));
      this.leases = new JobLeases(backend, lock, this.metrics);
      return backend;
    };
    this.worker = new Worker(
      QUEUE_NAME,
      async (job, token) => {
        const { leases } = this;
        if (!job.id || !token || !leases)
          throw new Error('BullMQ handed over a job without an id or a lock.');
        const lease = leases.hold(job.id, token);
        await this.run(lease, handler).finally(() => leases.release(lease));
      },
      {
        connection: this.connection,
        concurrency,
        lockDuration: lock,
        skipLockRenewal: true,
        skipStalledCheck: true,
        stalledInterval: roundMs(lock),
        maxStalledCount: MOST_STALLS,
        runRetryDelay: FETCH_RETRY_MS,
      },
      createBackend,
    );
    this.worker.on('error', (error) => this.logger.warn(error));
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
    const reason = new LockLostError('This worker is shutting down.');
    const deadline = setTimeout(() => this.leases?.abandonAll(reason), graceMs);
    await this.worker?.close();
    clearTimeout(deadline);
    this.leases?.stop();
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

  private async run({ jobId, token, controller }: JobLease, handler: ExecutionHandler): Promise<void> {
    const { signal } = controller;
    try {
      await handler(jobId, signal);
    } catch (error) {
      if (!(error instanceof LockLostError)) {
        this.logger.error(error);
        await sleep(RETRY_DELAY_MS, undefined, { signal }).catch(() => undefined); // the shutdown ends the wait
      }
      await this.handBack(jobId, token);
      throw new WaitingError(); // BullMQ must not take the job for failed, and remove it
    }
  }

  /** Back to the head of the queue. If the lock is another worker's, that one has it; if all fails, the lock runs out, which has the same effect. */
  private async handBack(jobId: string, token: string): Promise<void> {
    try {
      await this.queue.backend.retryJob(jobId, true, token);
    } catch (error) {
      this.logger.debug(error);
      // A queue that was emptied has no such job any more. One that is in it stays as it is.
      await this.add([jobId]).catch((failure: unknown) => this.logger.warn(failure));
    }
  }
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

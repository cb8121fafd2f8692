import { Logger } from '@nestjs/common';
import type { IQueueBackend } from 'bullmq';
import type { Metrics } from '../metrics.js';
import { LockLostError } from './execution-queue.js';

/** The longest pause between two rounds, ms. What a killed worker left is found two rounds after its locks ran out. */
const LONGEST_ROUND_MS = 1000;

/** What is needed of the queue's server. */
type Locks = Pick<IQueueBackend, 'extendLocks' | 'moveStalledJobsToWait' | 'changePriority'>;

/** A job that this process has taken. */
export interface JobLease {
  jobId: string;
  /** Of the lock. */
  token: string;
  /** Its signal aborts with a {@link LockLostError}. */
  controller: AbortController;
  /** By `Date.now()`. */
  renewedAt: number;
}

/** How often a round is made for a lock of `lockMs`; whole ms, as Redis takes no others. */
export function roundMs(lockMs: number): number {
  return Math.min(Math.floor(lockMs / 5), LONGEST_ROUND_MS);
}

/**
 * Keeps the locks of this process's jobs, and finds the jobs of workers that died. BullMQ does both by itself, but
 * - it knows a lock by its job alone: a worker that takes a job up again while its own earlier run still ends would
 *   abort the new run and stop renewing its lock, again and again;
 * - its search for stalled jobs does not know that the queue's server was away: after an outage longer than a lock it
 *   takes every running job from its living worker.
 * So one round does both, in an order: renew, and search only after the server has been there for a whole lock's time,
 * in which every living worker could renew.
 */
export class JobLeases {
  private readonly logger = new Logger(JobLeases.name);
  private readonly held = new Set<JobLease>();
  private timer: NodeJS.Timeout | undefined;
  private lastRound = Date.now();
  private searchFrom = 0;
  private abandoned: LockLostError | undefined;
  private stopped = false;

  /** @param lockMs how long a lock lasts that is not renewed, in ms */
  constructor(
    private readonly locks: Locks,
    private readonly lockMs: number,
    private readonly metrics: Pick<Metrics, 'lostLocks' | 'lostWorkers'>,
  ) {
    this.schedule();
  }

  /** Takes care of the lock of a job that was just taken, until {@link release}. */
  hold(jobId: string, token: string): JobLease {
    // Handed out again: whoever had it in this process has lost it.
    for (const earlier of this.held) if (earlier.jobId === jobId) this.lose(earlier);
    const lease = { jobId, token, controller: new AbortController(), renewedAt: Date.now() };
    this.held.add(lease);
    if (this.abandoned) lease.controller.abort(this.abandoned);
    return lease;
  }

  release(lease: JobLease): void {
    this.held.delete(lease);
  }

  /** Aborts all signals, those to come included; the locks are kept until the jobs are released. */
  abandonAll(reason: LockLostError): void {
    this.abandoned = reason;
    for (const { controller } of this.held) controller.abort(reason);
  }

  stop(): void {
    this.stopped = true;
    clearTimeout(this.timer);
  }

  private schedule(): void {
    this.timer = setTimeout(() => {
      void this.round().finally(() => this.stopped || this.schedule());
    }, roundMs(this.lockMs));
  }

  private async round(): Promise<void> {
    // By the clock on the wall, as the locks are: it goes on while the machine sleeps.
    const begun = Date.now();
    // This process was stopped, or too busy, and perhaps not alone in that.
    if (begun - this.lastRound > this.lockMs) this.searchFrom = Infinity;
    this.lastRound = begun;
    try {
      await this.renew(begun);
      const now = Date.now();
      const hung = now - begun > this.lockMs / 2; // for the others too
      if (hung || this.searchFrom === Infinity) this.searchFrom = now + this.lockMs;
      if (now >= this.searchFrom) await this.searchStalled();
    } catch (error) {
      // Once an outage, not once a second.
      this.logger[this.searchFrom === Infinity ? 'debug' : 'warn'](error);
      this.searchFrom = Infinity;
    }
  }

  private async renew(now: number): Promise<void> {
    const isDue = ({ renewedAt }: JobLease) => now - renewedAt >= this.lockMs / 5 || now < renewedAt;
    const due = [...this.held].filter(isDue);
    // Asked in vain where nothing is due: after an outage it tells that the server is there again.
    if (due.length === 0 && this.searchFrom !== Infinity) return;
    const jobIds = due.map(({ jobId }) => jobId);
    const tokens = due.map(({ token }) => token);
    const lost = new Set(await this.locks.extendLocks(jobIds, tokens, this.lockMs));
    for (const lease of due) {
      lease.renewedAt = now;
      if (lost.has(lease.jobId) && this.held.has(lease)) this.lose(lease);
    }
  }

  private lose(lease: JobLease): void {
    this.held.delete(lease);
    this.metrics.lostLocks.inc();
    this.logger.warn({ execution_id: lease.jobId }, 'The lock of an execution was lost.');
    lease.controller.abort(new LockLostError('The lock of this execution was lost.'));
  }

  /** What was begun goes on before what only waits: the PostgreSQL backend puts it at the end of the queue. */
  private async searchStalled(): Promise<void> {
    for (const jobId of await this.locks.moveStalledJobsToWait()) {
      this.metrics.lostWorkers.inc();
      this.logger.warn({ execution_id: jobId }, 'The worker of an execution was lost; another one goes on.');
      // It may have been taken up and ended already.
      await this.locks.changePriority(jobId, 0, true).catch((error: unknown) => this.logger.debug(error));
    }
  }
}

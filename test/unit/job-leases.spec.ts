import { afterEach, beforeEach, describe, expect, it, jest } from '@jest/globals';
import { Logger } from '@nestjs/common';
import { Metrics } from '../../src/metrics.js';
import { LockLostError } from '../../src/queue/execution-queue.js';
import { JobLeases } from '../../src/queue/job-leases.js';

const LOCK_MS = 5000;
/** A round is made each second: a fifth of the lock. */
const ROUND_MS = 1000;

/** The queue's server. */
class Locks {
  /** Tokens of the locks that are in force, by job. */
  readonly tokens = new Map<string, string>();
  renewals: string[][] = [];
  searches = 0;
  /** Jobs that the next search finds. */
  stalled: string[] = [];
  first: string[] = [];
  isAway = false;
  /** How long a renewal takes. */
  answerMs = 0;

  extendLocks(jobIds: string[], tokens: string[]): Promise<string[]> {
    if (this.isAway) return Promise.reject(new Error('away'));
    this.renewals.push(jobIds);
    const lost = jobIds.filter((jobId, index) => this.tokens.get(jobId) !== tokens[index]);
    if (this.answerMs === 0) return Promise.resolve(lost);
    return new Promise((resolve) => setTimeout(() => resolve(lost), this.answerMs));
  }

  moveStalledJobsToWait(): Promise<string[]> {
    if (this.isAway) return Promise.reject(new Error('away'));
    this.searches++;
    return Promise.resolve(this.stalled.splice(0));
  }

  changePriority(jobId: string): Promise<void> {
    if (jobId === 'gone') return Promise.reject(new Error('Missing key for job gone'));
    this.first.push(jobId);
    return Promise.resolve();
  }
}

let locks: Locks;
let leases: JobLeases;
let metrics: Metrics;

beforeEach(() => {
  Logger.overrideLogger(false);
  jest.useFakeTimers();
  locks = new Locks();
  metrics = new Metrics();
  leases = new JobLeases(locks, LOCK_MS, metrics);
});
afterEach(() => {
  leases.stop();
  expect(jest.getTimerCount()).toBe(0);
  jest.useRealTimers();
});

const pass = (ms: number) => jest.advanceTimersByTimeAsync(ms);

describe('the lock of a job that this process holds', () => {
  it('is renewed long before it runs out, for as long as it is held', async () => {
    locks.tokens.set('a', '1');
    const lease = leases.hold('a', '1');
    await pass(20_000);
    const renewed = locks.renewals.filter((jobIds) => jobIds.includes('a')).length;
    expect(renewed).toBe(20);
    expect(lease.controller.signal.aborted).toBe(false);
    leases.release(lease);
    await pass(20_000);
    expect(locks.renewals.filter((jobIds) => jobIds.includes('a'))).toHaveLength(renewed);
  });

  it('once it is lost aborts this run, and not the next one of the same job in the same process', async () => {
    const earlier = leases.hold('a', '1');
    locks.tokens.set('a', '2'); // it stalled, and was taken up again
    const later = leases.hold('a', '2');
    await pass(2 * ROUND_MS);
    expect(earlier.controller.signal.reason).toBeInstanceOf(LockLostError);
    expect(await metrics.lostLocks.get()).toMatchObject({ values: [{ value: 1 }] });
    leases.release(earlier);
    await pass(20_000);
    expect(later.controller.signal.aborted).toBe(false);
    expect(locks.renewals.at(-1)).toEqual(['a']);
  });
});

it('a job that is handed out when this worker has given up already is given up at once', () => {
  const reason = new LockLostError('closing');
  const before = leases.hold('a', '1');
  leases.abandonAll(reason);
  const after = leases.hold('b', '2');
  expect([before, after].map(({ controller }) => controller.signal.reason)).toEqual([reason, reason]);
});

describe('the search for jobs of lost workers', () => {
  it('is made in each round, and puts what it finds first', async () => {
    await pass(3 * ROUND_MS);
    expect(locks.searches).toBe(3);
    locks.stalled = ['a', 'b'];
    await pass(ROUND_MS);
    expect(locks.first).toEqual(['a', 'b']);
    expect(await metrics.lostWorkers.get()).toMatchObject({ values: [{ value: 2 }] });
  });

  it('after the server was away waits until every worker could renew its locks', async () => {
    locks.isAway = true;
    await pass(10 * ROUND_MS);
    locks.isAway = false;
    await pass(ROUND_MS);
    expect(locks.searches).toBe(0);
    expect(locks.renewals).toEqual([[]]); // so that the server is known to be back
    await pass(LOCK_MS - ROUND_MS);
    expect(locks.searches).toBe(0);
    await pass(ROUND_MS);
    expect(locks.searches).toBe(1);
  });

  it('after the server hung waits, too, though the renewal came through in the end', async () => {
    locks.tokens.set('a', '1');
    leases.hold('a', '1');
    locks.answerMs = 8000;
    await pass(ROUND_MS + 8000);
    locks.answerMs = 0;
    expect(locks.renewals).toEqual([['a']]);
    expect(locks.searches).toBe(0);
    await pass(2 * LOCK_MS);
    expect(locks.searches).toBeGreaterThan(0);
  });

  it('puts all of them first, though one has vanished meanwhile', async () => {
    locks.stalled = ['gone', 'a'];
    await pass(ROUND_MS);
    expect(locks.first).toEqual(['a']);
  });

  it('after this process itself was stopped renews its own locks first', async () => {
    locks.tokens.set('a', '1');
    leases.hold('a', '1');
    await pass(ROUND_MS);
    const { searches } = locks;
    jest.setSystemTime(Date.now() + 60_000); // as after SIGCONT, or when a notebook wakes up
    await pass(ROUND_MS);
    expect(locks.renewals.at(-1)).toEqual(['a']);
    expect(locks.searches).toBe(searches);
    await pass(LOCK_MS);
    expect(locks.searches).toBeGreaterThan(searches);
  });
});

import { randomUUID } from 'node:crypto';
import { Inject, Injectable, Logger } from '@nestjs/common';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { SessionConnection } from '../database/session-connection.js';
import type { Execution } from '../database/entities/execution.entity.js';
import { Metrics } from '../metrics.js';
import { LockLostError } from '../queue/execution-queue.js';
import { Repeat } from '../repeat.js';
import { IS_QUEUED, IS_RUNNING } from './status.js';
import { Stillness } from './stillness.js';

/** The longest pause between two rounds, ms. A lost worker is found at most two rounds after its lease ran out. */
const LONGEST_ROUND_MS = 1000;
/**
 * The longest gap between two looks at the leases, as a part of a lease's time: after a longer one all begin anew. What is
 * left of the time then is enough for a living worker to renew.
 */
export const LONGEST_GAP = 0.75;

/** Says that a process runs executions. It waits for the disk: a lease that a crash of PostgreSQL took back would be a lost one. */
const REGISTER = {
  name: 'worker-lease-register',
  text: 'INSERT INTO worker_lease (worker_id, renewed_at, lease_ms) VALUES ($1, clock_timestamp(), $2)',
};

const RENEW = {
  name: 'worker-lease-renew',
  text: `
    WITH relaxed AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
    UPDATE worker_lease SET renewed_at = clock_timestamp() FROM relaxed WHERE worker_id = $1 AND lost_at IS NULL`,
};

/** What this process runs and another one has taken: the next claim gives another fence, and before it the status is another. */
const TAKEN_AWAY = {
  name: 'worker-lease-taken-away',
  text: `
    SELECT execution_id FROM unnest($1::uuid[], $2::int[]) AS held (execution_id, fence) JOIN execution USING (execution_id)
     WHERE execution.fence <> held.fence OR execution.status ${IS_QUEUED}`,
};

const LEASES = {
  name: 'worker-lease-all',
  text: 'SELECT worker_id, extract(epoch FROM renewed_at)::text AS sign, lease_ms FROM worker_lease WHERE lost_at IS NULL',
};

/** Finds a process lost, unless it has renewed its lease meanwhile, or another process was faster. */
const DECLARE_LOST = {
  name: 'worker-lease-declare-lost',
  text: `
    UPDATE worker_lease SET lost_at = clock_timestamp(), ran_suspect = EXISTS (
             SELECT 1 FROM execution WHERE execution.status ${IS_RUNNING} AND execution.worker_id = worker_lease.worker_id
                AND leased_fence = fence AND losses >= 2)
     WHERE worker_id = $1 AND extract(epoch FROM renewed_at)::text = $2 AND lost_at IS NULL`,
};

const WITHDRAW = 'DELETE FROM worker_lease WHERE worker_id = $1 AND lost_at IS NULL';

interface Held {
  execution: Pick<Execution, 'execution_id' | 'fence'>;
  controller: AbortController;
}

/**
 * The lease with which this process runs executions: one row for all of them, renewed when half of its time has passed, so that
 * what an execution costs that only waits for its model is nothing. And the eye on the leases of the other processes: one that
 * was not renewed for its whole time, by this process's own monotonic clock, is lost. An outage of the database begins that time
 * anew, so that every living process can renew before it is taken for lost.
 *
 * A process whose lease was lost goes on until it finds that out, as the fences of its executions shut it out of their logs.
 * Then it lets go of them, and takes another lease.
 */
@Injectable()
export class WorkerLeases {
  private readonly logger = new Logger(WorkerLeases.name);
  private readonly leaseMs: number;
  /** Of its own: statements of executions that wait for a connection must not keep a living process from its lease. */
  private readonly session: SessionConnection;
  private readonly others: Stillness;
  private readonly held = new Set<Held>();
  private workerId: string | undefined;
  private registering: Promise<string> | undefined;
  private renewedAt = -Infinity;
  private isAway = false;
  private rounds: Repeat | undefined;

  constructor(
    @Inject(CONFIG) config: Pick<ServerConfig, 'JOB_LOCK_MS' | 'DATABASE_URL' | 'DATABASE_TIMEOUT_MS'>,
    private readonly metrics: Metrics,
  ) {
    this.leaseMs = config.JOB_LOCK_MS;
    this.others = new Stillness(config.JOB_LOCK_MS * LONGEST_GAP);
    this.session = new SessionConnection({
      connectionString: config.DATABASE_URL,
      kind: 'leases',
      setup: [],
      statementMs: config.DATABASE_TIMEOUT_MS,
    });
  }

  /** @param onLost is called whenever other processes were found lost */
  start(onLost: () => void): void {
    this.rounds = new Repeat(() => this.round(onLost), {
      everyMs: Math.min(this.leaseMs / 5, LONGEST_ROUND_MS),
      onError: (error) => {
        // Once an outage, not once a second.
        this.logger[this.isAway ? 'debug' : 'warn'](error);
        this.isAway = true;
        this.others.forget();
      },
    });
    this.rounds.start();
  }

  /** Ends the lease in good order, after all executions were let go. */
  async stop(): Promise<void> {
    await this.rounds?.stop();
    const { workerId } = this;
    // If that fails, the others find it lost, with nothing in it.
    if (workerId !== undefined)
      await this.session
        .query({ text: WITHDRAW, values: [workerId] })
        .catch((error: unknown) => this.logger.debug(error));
    await this.session.close();
  }

  /** The id of this process's lease, which it takes if it has none. Rejects as pg does. */
  async current(): Promise<string> {
    return this.workerId ?? (await (this.registering ??= this.register()));
  }

  /** Says that the lease with this id is not in force any more, though this process did not know it. */
  renounce(workerId: string): void {
    if (this.workerId === workerId) this.loseAll();
  }

  /** The signal aborts when another process has taken the execution over, with a {@link LockLostError}, and when `closing` does. */
  hold(
    execution: Pick<Execution, 'execution_id' | 'fence'>,
    closing: AbortSignal,
  ): { signal: AbortSignal; release: () => void } {
    const controller = new AbortController();
    const held = { execution, controller };
    const onClosing = () => controller.abort(closing.reason);
    closing.addEventListener('abort', onClosing);
    if (closing.aborted) onClosing();
    this.held.add(held);
    const release = () => {
      this.held.delete(held);
      closing.removeEventListener('abort', onClosing);
    };
    return { signal: controller.signal, release };
  }

  private async register(): Promise<string> {
    const workerId = randomUUID();
    const begun = performance.now();
    try {
      await this.session.query({ ...REGISTER, values: [workerId, this.leaseMs] });
      this.workerId = workerId;
      this.renewedAt = begun;
      return workerId;
    } finally {
      this.registering = undefined;
    }
  }

  private async round(onLost: () => void): Promise<void> {
    await this.renew();
    const lost = await this.findLost();
    this.isAway = false;
    if (lost > 0) onLost();
  }

  private async renew(): Promise<void> {
    const begun = performance.now();
    const workerId = await this.current();
    if (begun - this.renewedAt < this.leaseMs / 2) return;
    const { rowCount } = await this.session.query({ ...RENEW, values: [workerId] });
    if (rowCount === 0) return this.renounce(workerId);
    this.renewedAt = begun;
    await this.findTakenAway();
  }

  private async findTakenAway(): Promise<void> {
    const held = [...this.held];
    if (held.length === 0) return;
    const { rows } = await this.session.query<{ execution_id: string }>({
      ...TAKEN_AWAY,
      values: [
        held.map(({ execution }) => execution.execution_id),
        held.map(({ execution }) => execution.fence),
      ],
    });
    const taken = new Set(rows.map(({ execution_id }) => execution_id));
    for (const one of held) if (taken.has(one.execution.execution_id)) this.lose(one);
  }

  private loseAll(): void {
    this.workerId = undefined;
    for (const held of this.held) this.lose(held);
  }

  private lose(held: Held): void {
    if (!this.held.delete(held)) return;
    this.metrics.lostLocks.inc();
    this.logger.warn({ execution_id: held.execution.execution_id }, 'The lock of an execution was lost.');
    held.controller.abort(new LockLostError('The lock of this execution was lost.'));
  }

  private async findLost(): Promise<number> {
    const { rows } = await this.session.query<{ worker_id: string; sign: string; lease_ms: number }>(LEASES);
    const others = rows.filter(({ worker_id }) => worker_id !== this.workerId);
    const still = this.others.look(new Map(others.map(({ worker_id, sign }) => [worker_id, sign])));
    const lost = others.filter(({ worker_id, lease_ms }) => (still.get(worker_id) ?? 0) > lease_ms);
    let declared = 0;
    for (const { worker_id, sign } of lost) {
      const { rowCount } = await this.session.query({ ...DECLARE_LOST, values: [worker_id, sign] });
      declared += rowCount ?? 0;
    }
    return declared;
  }
}

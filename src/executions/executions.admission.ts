import { Inject, Injectable, Logger } from '@nestjs/common';
import type { OnApplicationBootstrap, OnModuleDestroy } from '@nestjs/common';
import { Pool } from 'pg';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { GroupCommit } from '../database/group-commit.js';
import { exclusively } from '../database/exclusively.js';
import { LOCKS } from '../database/locks.js';
import { isUnavailable } from '../database/unavailable.js';
import { AppError } from '../errors.js';
import { Metrics } from '../metrics.js';
import { ExecutionQueue } from '../queue/execution-queue.js';
import { Repeat } from '../repeat.js';
import { IS_QUEUED, IS_UNFINISHED } from './status.js';

/** How often a worker looks for executions that could be admitted: one may have ended whose process died before it could tell. */
const LOOK_MS = 1000;
/** How long a count of the queued executions is taken for right; what this process accepted since is added. */
const COUNT_MS = 250;
/** Seconds after which a client that was refused may try again. */
const RETRY_AFTER_S = 5;

/**
 * Admits as many executions of each deployment, the oldest first, as its limit leaves room for; a deployment without a limit,
 * or one that was deleted, leaves room for all. An execution that is just being cancelled is locked, and is passed over. The
 * commit need not wait for the disk: were it lost, the execution would be admitted again.
 */
const ADMIT = {
  name: 'execution-admit',
  text: `
    WITH relaxed AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true)), room AS MATERIALIZED (
      SELECT asked.deployment_id,
             CASE WHEN runtime_config->>'max_concurrency' IS NOT NULL THEN
               greatest(0, (runtime_config->>'max_concurrency')::int - (
                 SELECT count(*) FROM execution WHERE execution.deployment_id = asked.deployment_id
                    AND admitted AND execution.status ${IS_UNFINISHED}))
             END AS places
        FROM relaxed, unnest($1::uuid[]) AS asked (deployment_id)
        LEFT JOIN deployment ON deployment.deployment_id = asked.deployment_id
        LEFT JOIN deployment_revision USING (revision_id)
    ), chosen AS (
      SELECT next.execution_id FROM room CROSS JOIN LATERAL (
        SELECT execution_id FROM execution
         WHERE execution.deployment_id = room.deployment_id AND NOT admitted AND NOT held AND status ${IS_QUEUED}
         ORDER BY execution_id LIMIT room.places FOR NO KEY UPDATE SKIP LOCKED) AS next
    )
    UPDATE execution SET admitted = true FROM chosen WHERE execution.execution_id = chosen.execution_id
    RETURNING execution.execution_id`,
};

const HELD_BACK = `SELECT DISTINCT deployment_id FROM execution WHERE NOT admitted AND NOT held AND status ${IS_QUEUED}`;

const COUNT_QUEUED = {
  name: 'execution-count-queued',
  text: `SELECT count(*)::int AS queued FROM (SELECT 1 FROM execution WHERE status ${IS_QUEUED} LIMIT $1) AS waiting`,
};

/**
 * Holds executions back: new ones at the door while too many wait (`MAX_QUEUED`), and accepted ones of a deployment that has as
 * many in the queue and running as its `max_concurrency` allows. Those wait in the database, in the order of their arrival.
 */
@Injectable()
export class ExecutionsAdmission implements OnApplicationBootstrap, OnModuleDestroy {
  private readonly logger = new Logger(ExecutionsAdmission.name);
  private readonly admissions = new GroupCommit<string, void>((deploymentIds) => this.admit(deploymentIds));
  private readonly looks = new Repeat(() => this.look(), {
    everyMs: LOOK_MS,
    onError: (error) => this.report(error),
  });
  private queued = 0;
  /** Places that this process has taken, ever. */
  private taken = 0;
  private countedAt = -Infinity;
  private counting: Promise<void> | undefined;

  constructor(
    private readonly pool: Pool,
    private readonly queue: ExecutionQueue,
    @Inject(CONFIG) private readonly config: ServerConfig,
    private readonly metrics: Metrics,
  ) {}

  onApplicationBootstrap(): void {
    if (this.config.ROLE !== 'api') this.looks.start();
  }

  onModuleDestroy(): void {
    void this.looks.stop();
  }

  /** Takes places for some more executions, for all of them or for none. Rejects with `queue_full`. */
  async takePlaces(places: number): Promise<void> {
    // Nobody is refused on an old count, and nobody else waits for a new one.
    if (performance.now() - this.countedAt > COUNT_MS)
      this.count().catch((error: unknown) => this.report(error));
    const most = this.config.MAX_QUEUED - places;
    if (this.queued > most) await this.count();
    if (this.queued > most) {
      this.metrics.refusedExecutions.inc();
      throw new AppError(
        'queue_full',
        `${this.queued} executions wait for a worker already, and ${this.config.MAX_QUEUED} may. Try again later.`,
        { retryAfter: RETRY_AFTER_S },
      );
    }
    this.queued += places;
    this.taken += places;
  }

  /** Puts those executions of a deployment into the queue that it has room for now. */
  release(deploymentId: string): void {
    // If that fails, a worker finds them when it looks next.
    this.admissions.add(deploymentId).catch((error: unknown) => this.report(error));
  }

  private report(error: unknown): void {
    this.logger[isUnavailable(error) ? 'warn' : 'error'](error);
  }

  private count(): Promise<void> {
    if (this.counting) return this.counting;
    const before = this.taken;
    this.counting = this.pool
      .query<{ queued: number }>({ ...COUNT_QUEUED, values: [this.config.MAX_QUEUED] })
      .then(({ rows }) => {
        // What was taken meanwhile is not committed yet.
        this.queued = (rows[0]?.queued ?? 0) + this.taken - before;
        this.countedAt = performance.now();
      })
      .finally(() => (this.counting = undefined));
    return this.counting;
  }

  private async admit(asked: string[]): Promise<void[]> {
    const values = [[...new Set(asked)]];
    const { rows } = await exclusively(this.pool, LOCKS.admission, (client) =>
      client.query<{ execution_id: string }>({ ...ADMIT, values }),
    );
    // One that is not queued after this is found by the sweep, like any other that is accepted and not in the queue.
    await this.queue.add(rows.map(({ execution_id }) => execution_id).toSorted());
    return asked.map(() => undefined);
  }

  private async look(): Promise<void> {
    const { rows } = await this.pool.query<{ deployment_id: string }>(HELD_BACK);
    await Promise.all(rows.map(({ deployment_id }) => this.admissions.add(deployment_id)));
  }
}

import { Inject, Injectable, Logger } from '@nestjs/common';
import type { OnApplicationBootstrap, OnModuleDestroy } from '@nestjs/common';
import type { PoolClient } from 'pg';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { LOCKS } from '../database/locks.js';
import { SlowPool } from '../database/slow-pool.js';
import { isUnavailable } from '../database/unavailable.js';
import { Metrics } from '../metrics.js';
import { Repeat } from '../repeat.js';
import {
  BACKFILL,
  END_BACKFILL,
  FOLD,
  IS_DUE,
  LEFT,
  MINUTES_KEPT_DAYS,
  PRUNE,
} from './roll-ups.statements.js';

/** How often a worker looks for ends to add. */
const LOOK_MS = 1000;
/** Ends, or older executions, that one transaction adds: some ten ms. */
const PIECE = 2000;
/** Transactions in a row; the rest of a backlog follows the next time. */
const MOST_PIECES = 20;
/** Ends that the metric counts at most. */
const MOST_COUNTED = 100_000;
/** How often old statistics are deleted, and how many rows at once. */
const PRUNE_MS = 60_000;
const PRUNE_ROWS = 5000;

/**
 * Adds the ends of executions to the counters and the statistics of their deployments, one process at a time and each end once.
 * Whoever reads these before adds the rest for himself, so nothing waits for this. Every worker does it.
 */
@Injectable()
export class RollUps implements OnApplicationBootstrap, OnModuleDestroy {
  private readonly logger = new Logger(RollUps.name);
  private readonly looks = new Repeat((signal) => this.look(signal), {
    everyMs: LOOK_MS,
    onError: (error) => this.logger[isUnavailable(error) ? 'warn' : 'error'](error),
  });
  private prunedAt = -Infinity;

  constructor(
    @Inject(CONFIG) private readonly config: ServerConfig,
    private readonly pool: SlowPool,
    private readonly metrics: Metrics,
  ) {}

  onApplicationBootstrap(): void {
    if (this.config.ROLE !== 'api') this.looks.start();
  }

  onModuleDestroy(): void {
    void this.looks.stop();
  }

  private async look(signal: AbortSignal): Promise<void> {
    const { rows } = await this.pool.query<{ ends: boolean; backfill: boolean }>({ ...IS_DUE, values: [] });
    if (rows[0]?.ends) await repeat(() => this.fold(), signal);
    if (rows[0]?.backfill) await repeat(() => this.backfill(), signal);
    if (signal.aborted) return;
    await this.measure();
    if (performance.now() - this.prunedAt > PRUNE_MS) await this.prune();
  }

  /** Adds some ends. @returns how many; 0 while another process is at it */
  fold(): Promise<number> {
    return this.inTurn(async (client) => {
      const { rows } = await client.query<{ taken: number }>({ ...FOLD, values: [PIECE] });
      return rows[0]?.taken ?? 0;
    });
  }

  /** Adds some executions that ended before there were statistics. @returns how many it looked at */
  backfill(): Promise<number> {
    return this.inTurn(async (client) => {
      const { rows } = await client.query<{ looked_at: number }>({ ...BACKFILL, values: [PIECE] });
      const lookedAt = rows[0]?.looked_at ?? 0;
      if (lookedAt < PIECE) await client.query(END_BACKFILL);
      return lookedAt;
    });
  }

  /** A transaction that one process at a time is in; nobody waits for the other. */
  private inTurn(work: (client: PoolClient) => Promise<number>): Promise<number> {
    return this.pool.withClient(async (client) => {
      await client.query(
        `BEGIN; SET LOCAL idle_in_transaction_session_timeout = '2s'; SET LOCAL lock_timeout = '1s'`,
      );
      const { rows } = await client.query<{ is_mine: boolean }>(
        `SELECT pg_try_advisory_xact_lock(${LOCKS.counters}) AS is_mine`,
      );
      const done = rows[0]?.is_mine ? await work(client) : 0;
      await client.query('COMMIT');
      return done;
    });
  }

  private async measure(): Promise<void> {
    const { rows } = await this.pool.query<{ ends: number; age: number }>({
      ...LEFT,
      values: [MOST_COUNTED],
    });
    this.metrics.uncountedEnds.set(rows[0]?.ends ?? 0);
    this.metrics.uncountedEndsAge.set(rows[0]?.age ?? 0);
  }

  /** Deletes some of the statistics that nobody reads any more. */
  async prune(): Promise<void> {
    this.prunedAt = performance.now();
    await this.pool.query({ ...PRUNE, values: [PRUNE_ROWS, MINUTES_KEPT_DAYS] });
  }
}

/** Does some pieces in a row, as long as they are whole ones. */
async function repeat(piece: () => Promise<number>, signal: AbortSignal): Promise<void> {
  for (let pieces = 0; pieces < MOST_PIECES && !signal.aborted; pieces++) {
    if ((await piece()) < PIECE) return;
  }
}

import { randomUUID } from 'node:crypto';
import type { Socket } from 'node:net';
import { Injectable, Logger } from '@nestjs/common';
import type { OnApplicationShutdown } from '@nestjs/common';
import type { Response } from 'express';
import { Pool } from 'pg';
import { Repeat } from '../repeat.js';
import { IS_UNFINISHED } from './status.js';

/** How soon a client that came or left is counted in the database. Streams shorter than that cost one statement, not two. */
const WRITE_DELAY_MS = 200;
/** How often a process that counts clients gives a sign of life. */
const BEAT_MS = 2000;
/** A process that was silent for so long is dead, and so are its clients' connections. */
const DEAD_MS = 5 * BEAT_MS;

/**
 * Only this process writes its rows, and nothing else waits for them. What happens after an execution's end is counted,
 * too, but is no leaving.
 */
const COUNT = {
  name: 'subscribers-count',
  text: `
    WITH relaxed AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true)), changed AS MATERIALIZED (
      SELECT execution_id, item.count, status ${IS_UNFINISHED} AS unfinished
        FROM unnest($2::uuid[], $3::int[]) AS item (execution_id, count) JOIN execution USING (execution_id), relaxed
    ), before_the_end AS (
      INSERT INTO execution_subscriber AS stored (execution_id, process_id, count, left_at)
      SELECT execution_id, $1, count, CASE WHEN count = 0 THEN now() END FROM changed WHERE unfinished
          ON CONFLICT (execution_id, process_id) DO UPDATE SET count = excluded.count, left_at = excluded.left_at
    )
    INSERT INTO execution_subscriber AS stored (execution_id, process_id, count)
    SELECT execution_id, $1, count FROM changed
     WHERE NOT unfinished
       AND (count > 0 OR EXISTS (SELECT 1 FROM execution_subscriber AS counted
                                  WHERE counted.execution_id = changed.execution_id AND counted.process_id = $1))
        ON CONFLICT (execution_id, process_id) DO UPDATE SET count = excluded.count`,
};

const BEAT = {
  name: 'subscribers-beat',
  text: `INSERT INTO server_process (process_id, seen_at) VALUES ($1, now())
             ON CONFLICT (process_id) DO UPDATE SET seen_at = excluded.seen_at
         RETURNING xmax = 0 AS is_new`,
};

/** A process that gave no sign of life has no clients any more. One that was only silent finds its row gone, and counts anew. */
const FORGET_DEAD = `
  WITH dead AS (
    DELETE FROM server_process WHERE seen_at < now() - $1 * interval '1 ms' RETURNING process_id
  )
  UPDATE execution_subscriber SET count = 0, left_at = now()
    FROM dead WHERE execution_subscriber.process_id = dead.process_id AND count > 0`;

const PRESENCE = {
  name: 'subscribers-presence',
  text: `
    SELECT execution_id, sum(count)::int AS subscribers, CASE WHEN sum(count) = 0 THEN max(left_at) END AS disconnected_at
      FROM execution_subscriber WHERE execution_id = ANY ($1::uuid[]) GROUP BY execution_id`,
};

/** Who follows an execution. */
export interface Presence {
  subscribers: number;
  /** When the last one left before the end; null while there is one, and where there never was one. */
  disconnected_at: Date | null;
}

/** Callbacks for the end of a connection, which has one listener, however many requests wait on it. */
const waiting = new WeakMap<Socket, Set<() => void>>();

/**
 * Calls back when an answer is over or its connection has closed, at once if that was before. An answer that waits behind
 * another one on its connection (pipelining) has no socket yet, and never closes when that one does.
 */
export function onceOver(response: Response, callback: () => void): void {
  const { socket } = response.req;
  if (response.closed || socket.destroyed) return callback();
  let callbacks = waiting.get(socket);
  if (!callbacks) {
    const all = (callbacks = new Set());
    waiting.set(socket, all);
    socket.once('close', () => all.forEach((call) => call()));
  }
  const ofConnection = callbacks;
  const over = () => {
    if (ofConnection.delete(over)) callback();
  };
  ofConnection.add(over);
  response.once('close', over);
}

/** Counts the clients that follow an execution, and writes the counts into the database. */
@Injectable()
export class Subscribers implements OnApplicationShutdown {
  private readonly logger = new Logger(Subscribers.name);
  private readonly self = randomUUID();
  private readonly counts = new Map<string, number>();
  private readonly changed = new Set<string>();
  /** While somebody is counted, and only then, it goes on. */
  private readonly writes = new Repeat(
    async () => {
      await this.write();
      if (this.changed.size > 0) return WRITE_DELAY_MS;
      if (this.counts.size === 0) return false;
    },
    { everyMs: BEAT_MS, onError: (error) => this.logger.warn(error) },
  );
  private lastBeat = -Infinity;
  private closed = false;

  constructor(private readonly pool: Pool) {}

  /** After the streams have ended: nothing of this process is left in the database. */
  async onApplicationShutdown(): Promise<void> {
    this.closed = true;
    await this.writes.stop();
    if (this.lastBeat === -Infinity) return;
    for (const executionId of this.counts.keys()) this.changed.add(executionId);
    this.counts.clear();
    await this.writeCounts().catch((error: unknown) => this.logger.warn(error)); // the others find out by themselves
    await this.pool
      .query('DELETE FROM server_process WHERE process_id = $1', [this.self])
      .catch((error: unknown) => this.logger.warn(error));
  }

  /** Counts a client of the execution, until the function that it returns is called: once. */
  follow(executionId: string): () => void {
    this.change(executionId, 1);
    return () => this.change(executionId, -1);
  }

  /** Counts a client until its answer is over, be it that it is so already. One that asks for the head alone does not follow. */
  followUntilOver(executionId: string, response: Response): void {
    if (response.req.method !== 'HEAD') onceOver(response, this.follow(executionId));
  }

  /** Takes the clients of dead processes out of the counts. */
  async forgetDead(): Promise<void> {
    // First a sign of life, for when the database was away for all of them.
    if (this.counts.size > 0) await this.beat();
    await this.pool.query(FORGET_DEAD, [DEAD_MS]);
  }

  /** Who follows these executions now; one that nobody ever followed is left out. */
  async presence(executionIds: string[]): Promise<Map<string, Presence>> {
    const { rows } = await this.pool.query<Presence & { execution_id: string }>({
      ...PRESENCE,
      values: [executionIds],
    });
    return new Map(rows.map((row) => [row.execution_id, row]));
  }

  private change(executionId: string, by: 1 | -1): void {
    const count = (this.counts.get(executionId) ?? 0) + by;
    if (count > 0) this.counts.set(executionId, count);
    else this.counts.delete(executionId);
    this.changed.add(executionId);
    if (!this.closed) this.writes.start(WRITE_DELAY_MS);
  }

  private async write(): Promise<void> {
    if (performance.now() - this.lastBeat >= BEAT_MS) await this.beat();
    if (this.changed.size > 0) await this.writeCounts();
  }

  private async beat(): Promise<void> {
    const { rows } = await this.pool.query<{ is_new: boolean }>({ ...BEAT, values: [this.self] });
    this.lastBeat = performance.now();
    // The others took this process for dead, and its clients for gone.
    if (rows[0]?.is_new) for (const executionId of this.counts.keys()) this.changed.add(executionId);
  }

  private async writeCounts(): Promise<void> {
    const executionIds = [...this.changed];
    this.changed.clear();
    const counts = executionIds.map((executionId) => this.counts.get(executionId) ?? 0);
    try {
      await this.pool.query({ ...COUNT, values: [this.self, executionIds, counts] });
    } catch (error) {
      executionIds.forEach((executionId) => this.changed.add(executionId));
      throw error;
    }
  }
}

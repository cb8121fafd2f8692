import { randomUUID } from 'node:crypto';
import { Injectable, Logger } from '@nestjs/common';
import type { OnApplicationShutdown } from '@nestjs/common';
import type { Response } from 'express';
import { Pool } from 'pg';

/** How soon a client that came or left is counted in the database. Streams shorter than that cost one statement, not two. */
const WRITE_DELAY_MS = 200;
/** How often a process that counts clients gives a sign of life. */
const BEAT_MS = 2000;
/** A process that was silent for so long is dead, and so are its clients' connections. */
const DEAD_MS = 5 * BEAT_MS;

/**
 * Each process has a count of its own in the row, so a dead one's can be taken out. Rows that somebody holds are left for
 * the next time: waiting for several rows could make two statements wait for each other.
 */
const COUNT = {
  name: 'subscribers-count',
  text: `
    WITH relaxed AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true)), free AS MATERIALIZED (
      SELECT execution_id, changed.count FROM execution JOIN unnest($2::uuid[], $3::int[]) AS changed (execution_id, count)
             USING (execution_id), relaxed
         FOR NO KEY UPDATE OF execution SKIP LOCKED
    ), counted AS (
    UPDATE execution SET
           subscribers = CASE WHEN free.count > 0 THEN subscribers || jsonb_build_object($1::text, free.count)
                              ELSE subscribers - $1::text END,
           disconnected_at = CASE WHEN status NOT IN ('queued', 'running') THEN disconnected_at
                                  WHEN free.count = 0 AND subscribers - $1::text = '{}'
                                  THEN coalesce(disconnected_at, now()) END
      FROM free
     WHERE execution.execution_id = free.execution_id
       AND (free.count > 0 OR subscribers ? $1::text OR status IN ('queued', 'running'))
    )
    SELECT execution_id FROM free`,
};

const BEAT = {
  name: 'subscribers-beat',
  text: `INSERT INTO server_process (process_id, seen_at) VALUES ($1, now())
             ON CONFLICT (process_id) DO UPDATE SET seen_at = excluded.seen_at`,
};

/** Takes the counts of processes that give no sign of life out of all executions. */
const FORGET_DEAD = `
  WITH dead AS (
    DELETE FROM server_process WHERE seen_at < now() - 10 * $1 * interval '1 ms'
  ), alive AS MATERIALIZED (
    SELECT coalesce(array_agg(process_id::text), '{}') AS ids FROM server_process
     WHERE seen_at > now() - $1 * interval '1 ms'
  ), stale AS MATERIALIZED (
    SELECT execution_id, (SELECT coalesce(jsonb_object_agg(key, value), '{}') FROM jsonb_each(subscribers)
                           WHERE key = ANY (alive.ids)) AS kept
      FROM execution, alive
     WHERE subscribers <> '{}'
       AND EXISTS (SELECT 1 FROM jsonb_object_keys(subscribers) AS key WHERE key <> ALL (alive.ids))
       FOR NO KEY UPDATE OF execution SKIP LOCKED
  )
  UPDATE execution SET subscribers = stale.kept,
         disconnected_at = CASE WHEN status NOT IN ('queued', 'running') THEN disconnected_at
                                WHEN stale.kept = '{}' THEN coalesce(disconnected_at, now()) END
    FROM stale WHERE execution.execution_id = stale.execution_id`;

/** Counts the clients that follow an execution, and writes the counts into its row. */
@Injectable()
export class Subscribers implements OnApplicationShutdown {
  private readonly logger = new Logger(Subscribers.name);
  private readonly self = randomUUID();
  private readonly counts = new Map<string, number>();
  private readonly changed = new Set<string>();
  private timer: NodeJS.Timeout | undefined;
  private dueAt = Infinity;
  private writing: Promise<void> | undefined;
  private lastBeat = -Infinity;
  private closed = false;

  constructor(private readonly pool: Pool) {}

  /** After the streams have ended: nothing of this process is left in the database. */
  async onApplicationShutdown(): Promise<void> {
    this.closed = true;
    clearTimeout(this.timer);
    await this.writing;
    if (this.lastBeat === -Infinity) return;
    for (const executionId of this.counts.keys()) this.changed.add(executionId);
    this.counts.clear();
    await this.writeCounts().catch((error: unknown) => this.logger.warn(error)); // the others find out by themselves
    await this.pool
      .query('DELETE FROM server_process WHERE process_id = $1', [this.self])
      .catch((error: unknown) => this.logger.warn(error));
  }

  /** Counts a client of the execution until its connection closes, be it that it did so before. */
  follow(executionId: string, response: Response): void {
    this.change(executionId, 1);
    const leave = () => this.change(executionId, -1);
    if (response.closed) leave();
    else response.once('close', leave);
  }

  /** Takes the clients of dead processes out of the counts. */
  async forgetDead(): Promise<void> {
    await this.pool.query(FORGET_DEAD, [DEAD_MS]);
  }

  private change(executionId: string, by: 1 | -1): void {
    const count = (this.counts.get(executionId) ?? 0) + by;
    if (count > 0) this.counts.set(executionId, count);
    else this.counts.delete(executionId);
    this.changed.add(executionId);
    this.schedule(WRITE_DELAY_MS);
  }

  /** While somebody is counted, and only then, there is a timer. */
  private schedule(ms: number): void {
    const dueAt = performance.now() + ms;
    if (this.closed || this.writing || dueAt >= this.dueAt) return;
    this.dueAt = dueAt;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      this.dueAt = Infinity;
      this.writing = this.write()
        .then(
          () => (this.changed.size > 0 ? WRITE_DELAY_MS : BEAT_MS),
          (error: unknown) => {
            this.logger.warn(error);
            return BEAT_MS;
          },
        )
        .then((delay) => {
          this.writing = undefined;
          if (this.changed.size > 0 || this.counts.size > 0) this.schedule(delay);
        });
    }, ms);
  }

  private async write(): Promise<void> {
    const silence = performance.now() - this.lastBeat;
    if (silence >= BEAT_MS) {
      await this.pool.query({ ...BEAT, values: [this.self] });
      this.lastBeat = performance.now();
      // The others may have taken this process for dead, and its counts out.
      if (silence >= DEAD_MS) for (const executionId of this.counts.keys()) this.changed.add(executionId);
    }
    if (this.changed.size > 0) await this.writeCounts();
  }

  private async writeCounts(): Promise<void> {
    const executionIds = [...this.changed];
    this.changed.clear();
    const counts = executionIds.map((executionId) => this.counts.get(executionId) ?? 0);
    try {
      const { rows } = await this.pool.query<{ execution_id: string }>({
        ...COUNT,
        values: [this.self, executionIds, counts],
      });
      const written = new Set(rows.map((row) => row.execution_id));
      for (const executionId of executionIds) if (!written.has(executionId)) this.changed.add(executionId);
    } catch (error) {
      executionIds.forEach((executionId) => this.changed.add(executionId));
      throw error;
    }
  }
}

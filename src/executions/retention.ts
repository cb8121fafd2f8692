import { setTimeout as sleep } from 'node:timers/promises';
import { Inject, Injectable, Logger } from '@nestjs/common';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { SlowPool } from '../database/slow-pool.js';
import { END_PARTS } from '../event-log/merged-order.js';

/** Executions and chunks of a batch, about: a transaction of some ten milliseconds. */
const BATCH_EXECUTIONS = 200;
const BATCH_CHUNKS = 20_000;
const BATCH_EVENTS = 5000;
/** The order of one batch may have millions of rows. */
const BATCH_MERGED = 1;
/** Between two batches, so that a large backlog does not keep the database from its work. */
const PAUSE_MS = 100;
/** At once; the rest of a backlog follows the next time. */
const MOST_BATCHES = 10;

/**
 * Deletes whole logs, so that no reader meets a gap, the oldest first. Processes that do it at the same time take
 * different ones.
 */
const DELETE_LOGS = `
  WITH oldest AS MATERIALIZED (
    SELECT execution_id, finished_at, last_sequence FROM execution
     WHERE log_deleted_at IS NULL AND finished_at < now() - $1 * interval '1 day'
       AND (batch_id IS NULL
            OR (SELECT log_deleted_at IS NOT NULL FROM batch WHERE batch.batch_id = execution.batch_id))
     ORDER BY finished_at LIMIT ${BATCH_EXECUTIONS} FOR NO KEY UPDATE SKIP LOCKED
  ), chosen AS MATERIALIZED (
    SELECT execution_id
      FROM (SELECT execution_id, sum(last_sequence) OVER (ORDER BY finished_at, execution_id) - last_sequence AS before
              FROM oldest) AS summed
     WHERE before < ${BATCH_CHUNKS}
  ), deleted AS (
    DELETE FROM execution_chunk WHERE execution_id IN (SELECT execution_id FROM chosen)
  ), forgotten AS (
    DELETE FROM execution_subscriber WHERE execution_id IN (SELECT execution_id FROM chosen)
  )
  UPDATE execution SET log_deleted_at = now() FROM chosen WHERE execution.execution_id = chosen.execution_id`;

/**
 * Merged logs: the order, but for its end, and the batches' own chunks. The logs of the items are kept until then, so that no
 * reader meets a gap.
 */
const DELETE_BATCHES = `
  WITH oldest AS MATERIALIZED (
    SELECT batch_id FROM batch
     WHERE log_deleted_at IS NULL AND finished_at < now() - $1 * interval '1 day'
     ORDER BY finished_at LIMIT ${BATCH_MERGED} FOR NO KEY UPDATE SKIP LOCKED
  ), ordered AS (
    DELETE FROM batch_order WHERE batch_id IN (SELECT batch_id FROM oldest) AND parts <> '${END_PARTS}'
  ), deleted AS (
    DELETE FROM execution_chunk WHERE execution_id IN (SELECT batch_id FROM oldest)
  )
  UPDATE batch SET log_deleted_at = now() FROM oldest WHERE batch.batch_id = oldest.batch_id`;

const DELETE_EVENTS = `
  DELETE FROM status_event WHERE event_id IN (
    SELECT event_id FROM (SELECT event_id, created_at FROM status_event ORDER BY event_id LIMIT ${BATCH_EVENTS}) AS oldest
     WHERE created_at < now() - $1 * interval '1 day')`;

/** Deletes what nobody replays any more: chunks and changes of status that are older than `EVENT_RETENTION_DAYS`. */
@Injectable()
export class Retention {
  private readonly logger = new Logger(Retention.name);

  constructor(
    private readonly pool: SlowPool,
    @Inject(CONFIG) private readonly config: ServerConfig,
  ) {}

  /** Deletes some small batches, the oldest first, until `signal` aborts. Executions with their results and steps stay. */
  async expire(signal: AbortSignal): Promise<void> {
    // One that fails, as with an order that is too long to be deleted in time, keeps none of the others from being done.
    const deleted = (statement: string) =>
      this.deleteAll(statement, signal).catch((error: unknown) => {
        this.logger.warn(error);
        return 0;
      });
    const batches = await deleted(DELETE_BATCHES);
    const logs = await deleted(DELETE_LOGS);
    const events = await deleted(DELETE_EVENTS);
    if (batches + logs + events > 0)
      this.logger.log({ batches, logs, events }, 'Retention deleted what is too old.');
  }

  private async deleteAll(statement: string, signal: AbortSignal): Promise<number> {
    let total = 0;
    for (let batch = 0; batch < MOST_BATCHES && !signal.aborted; batch++) {
      const values = [this.config.EVENT_RETENTION_DAYS];
      const { rowCount } = await this.pool.query({ text: statement, values });
      if (!rowCount) break;
      total += rowCount;
      await sleep(PAUSE_MS, undefined, { signal }).catch(() => undefined); // an abort: the loop ends
    }
    return total;
  }
}

import { Inject, Injectable, Logger } from '@nestjs/common';
import type { OnApplicationBootstrap, OnModuleDestroy } from '@nestjs/common';
import { Pool } from 'pg';
import type { PoolClient } from 'pg';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import type { Batch } from '../database/entities/batch.entity.js';
import type { Execution } from '../database/entities/execution.entity.js';
import { exclusively } from '../database/exclusively.js';
import { GroupCommit } from '../database/group-commit.js';
import { LOCKS } from '../database/locks.js';
import { isUnavailable } from '../database/unavailable.js';
import { serializeBatchChunk } from '../event-log/chunk-lines.js';
import { ChunkSerializer } from '../event-log/chunk.js';
import type { ItemCounts } from '../event-log/chunk.js';
import { MergedLog } from '../event-log/merged-log.js';
import { ExecutionEnds } from '../executions/ends.js';
import { ExecutionsAdmission } from '../executions/executions.admission.js';
import { executionLinks } from '../executions/executions.dto.js';
import { RunningExecutions } from '../executions/running-executions.js';
import { IS_ERROR, IS_QUEUED, IS_RUNNING, IS_UNFINISHED, isUnbegun } from '../executions/status.js';
import { ExecutionQueue } from '../queue/execution-queue.js';
import { Repeat } from '../repeat.js';
import { batchLinks } from './batches.dto.js';

/** How often a worker looks at the running batches: an item may have ended whose process died before it could tell. */
const LOOK_MS = 1000;

/** Whether nothing of a batch may begin any more, because an item failed. */
const IS_STOPPED = `on_item_error = 'stop' AND EXISTS (
                 SELECT 1 FROM execution WHERE execution.batch_id = batch.batch_id AND execution.status ${IS_ERROR})`;

/**
 * Requests the cancellation of items: of all unfinished ones of a batch that is to be cancelled, and, where nothing is to
 * begin after a failure, of those that no worker has taken up. What is locked is just changing, and is met again.
 */
const STOP = {
  name: 'batch-stop',
  text: `
    WITH stopping AS MATERIALIZED (
      SELECT batch_id, cancel_requested_at IS NOT NULL AS entirely FROM batch
       WHERE batch_id = ANY ($1::uuid[]) AND status ${IS_RUNNING}
         AND (cancel_requested_at IS NOT NULL OR ${IS_STOPPED})
    ), chosen AS (
      SELECT execution_id FROM stopping JOIN execution USING (batch_id)
       WHERE status ${IS_UNFINISHED}
         AND (status ${IS_QUEUED} AND attempt = 0 OR entirely AND execution.cancel_requested_at IS NULL)
         FOR NO KEY UPDATE OF execution SKIP LOCKED)
    UPDATE execution SET cancel_requested_at = coalesce(cancel_requested_at, now())
      FROM chosen WHERE execution.execution_id = chosen.execution_id
    RETURNING execution.*`,
};

/**
 * Lets the next items of each batch go, as many as its concurrency has room for; the deployment's own limit comes after it. It
 * looks again whether the batch is to stop: the place that it sees free may be that of an item that has failed just now.
 */
const LET_GO = {
  name: 'batch-let-go',
  text: `
    WITH room AS MATERIALIZED (
      SELECT batch_id, greatest(0, concurrency - (
               SELECT count(*) FROM execution
                WHERE execution.batch_id = batch.batch_id AND NOT held AND execution.status ${IS_UNFINISHED})) AS places
        FROM batch
       WHERE batch_id = ANY ($1::uuid[]) AND status ${IS_RUNNING} AND cancel_requested_at IS NULL AND NOT (${IS_STOPPED})
    ), chosen AS (
      SELECT next.execution_id FROM room CROSS JOIN LATERAL (
        SELECT execution_id FROM execution
         WHERE execution.batch_id = room.batch_id AND held AND status ${IS_QUEUED} AND cancel_requested_at IS NULL
         ORDER BY batch_index LIMIT room.places FOR NO KEY UPDATE SKIP LOCKED) AS next
    )
    UPDATE execution
       SET held = false,
           admitted = NOT EXISTS (SELECT 1 FROM deployment JOIN deployment_revision USING (revision_id)
                                   WHERE deployment.deployment_id = execution.deployment_id
                                     AND runtime_config->>'max_concurrency' IS NOT NULL)
      FROM chosen WHERE execution.execution_id = chosen.execution_id
    RETURNING execution.execution_id, execution.deployment_id, execution.admitted`,
};

/** Batches without an unfinished item. */
const DONE = {
  name: 'batch-done',
  text: `
    SELECT * FROM batch
     WHERE batch_id = ANY ($1::uuid[]) AND status ${IS_RUNNING}
       AND NOT EXISTS (SELECT 1 FROM execution
                        WHERE execution.batch_id = batch.batch_id AND execution.status ${IS_UNFINISHED})
       FOR NO KEY UPDATE`,
};

const ENDS = {
  name: 'batch-ends',
  text: 'SELECT item_id, execution_id, status FROM execution WHERE batch_id = $1 ORDER BY batch_index',
};

/** The end of a batch with its last chunk, which nobody may see before it is on the disk. */
const FINISH = {
  name: 'batch-finish',
  text: `
    WITH finished AS (
      UPDATE batch SET status = $2, finished_at = $3 FROM (SELECT set_config('synchronous_commit', 'on', true)) AS durable
       WHERE batch_id = $1)
    INSERT INTO execution_chunk (execution_id, first_sequence, last_sequence, chunks) VALUES ($1, 2, 2, $4)`,
};

/** Batches that can be carried on: that are to stop, have room for an item, or no unfinished one. */
const DUE = {
  name: 'batch-due',
  text: `
    SELECT batch_id FROM batch CROSS JOIN LATERAL (
             SELECT count(*) AS unfinished, count(*) FILTER (WHERE NOT held) AS let_go FROM execution
              WHERE execution.batch_id = batch.batch_id AND execution.status ${IS_UNFINISHED}) AS items
     WHERE status ${IS_RUNNING}
       AND (cancel_requested_at IS NOT NULL OR ${IS_STOPPED} OR unfinished = 0 OR let_go < least(concurrency, unfinished))`,
};

/** An item that was let go: into the queue, if its deployment has no limit. */
type Released = Pick<Execution, 'execution_id' | 'deployment_id' | 'admitted'>;

/** Carries batches on: lets their items go one after the other, stops what is to be stopped, and ends them. */
@Injectable()
export class BatchProgress implements OnApplicationBootstrap, OnModuleDestroy {
  private readonly logger = new Logger(BatchProgress.name);
  private readonly rounds = new GroupCommit<string, void>((batchIds) => this.advanceAll(batchIds));
  /** Batches whose items are being ended; nothing else is done to them meanwhile. */
  private readonly stopping = new Map<string, Promise<void>>();
  private readonly looks = new Repeat(() => this.look(), {
    everyMs: LOOK_MS,
    onError: (error) => this.report(error),
  });

  constructor(
    private readonly pool: Pool,
    private readonly queue: ExecutionQueue,
    private readonly log: MergedLog,
    private readonly running: RunningExecutions,
    private readonly admission: ExecutionsAdmission,
    @Inject(CONFIG) private readonly config: ServerConfig,
    private readonly ends: ExecutionEnds,
  ) {
    // If it fails, a worker carries the batch on when it looks next.
    ends.handle(({ batch_id }) => {
      if (batch_id !== null) this.advance(batch_id).catch((error: unknown) => this.report(error));
    });
  }

  onApplicationBootstrap(): void {
    if (this.config.ROLE !== 'api') this.looks.start();
  }

  onModuleDestroy(): void {
    void this.looks.stop();
  }

  /** Carries a batch on as far as it can be now. Repeating it changes nothing. */
  async advance(batchId: string): Promise<void> {
    await this.rounds.add(batchId);
    await this.stopping.get(batchId);
  }

  /** What can take long is not waited for: a Redis that is away, and the ends of one batch's items, would hold up all others. */
  private async advanceAll(asked: string[]): Promise<void[]> {
    const batchIds = [...new Set(asked)].filter((batchId) => !this.stopping.has(batchId));
    if (batchIds.length === 0) return asked.map(() => undefined);
    const { stopped, released, finished } = await exclusively(this.pool, LOCKS.batch, (client) =>
      this.advanceOnce(client, batchIds),
    );
    finished.forEach(({ batch_id }) => this.log.ended(batch_id));
    // What does not get into the queue is put in by the sweep.
    this.enqueue(released).catch((error: unknown) => this.report(error));
    for (const batchId of batchIds) {
      const items = stopped.filter(({ batch_id }) => batch_id === batchId);
      this.stop(batchId, items);
    }
    return asked.map(() => undefined);
  }

  private async advanceOnce(
    client: PoolClient,
    batchIds: string[],
  ): Promise<{ stopped: Execution[]; released: Released[]; finished: Batch[] }> {
    const values = [batchIds];
    // Were it lost, it would be done again.
    await client.query('SET LOCAL synchronous_commit = off');
    const { rows: stopped } = await client.query<Execution>({ ...STOP, values });
    const { rows: released } = await client.query<Released>({ ...LET_GO, values });
    const { rows: finished } = await client.query<Batch>({ ...DONE, values });
    for (const batch of finished) await finish(client, batch);
    return { stopped, released, finished };
  }

  private async enqueue(released: Released[]): Promise<void> {
    const waiting = released.filter((item) => !item.admitted);
    new Set(waiting.map(({ deployment_id }) => deployment_id)).forEach((id) => this.admission.release(id));
    const admitted = released.filter((item) => item.admitted).map(({ execution_id }) => execution_id);
    if (admitted.length > 0) await this.queue.add(admitted.toSorted());
  }

  /** Ends what no worker has taken up, after which the batch goes on; the others are told. */
  private stop(batchId: string, items: Execution[]): void {
    const unbegun = items.filter(isUnbegun);
    const begun = items.filter((item) => !unbegun.includes(item));
    this.running.cancel(begun.map(({ execution_id }) => execution_id));
    if (unbegun.length === 0) return;
    const end = async () => {
      const ended = await Promise.allSettled(
        unbegun.map((item) => this.ends.end(item, { status: 'cancelled' })),
      );
      this.stopping.delete(batchId);
      const failed = ended.find((each) => each.status === 'rejected');
      if (failed) throw failed.reason;
      await this.rounds.add(batchId);
    };
    // What fails is met again when a worker looks next.
    this.stopping.set(
      batchId,
      end().catch((error: unknown) => this.report(error)),
    );
  }

  private async look(): Promise<void> {
    const { rows } = await this.pool.query<{ batch_id: string }>(DUE);
    await Promise.all(rows.map(({ batch_id }) => this.rounds.add(batch_id)));
  }

  private report(error: unknown): void {
    this.logger[isUnavailable(error) ? 'warn' : 'error'](error);
  }
}

/** Ends a batch; a cancellation that was requested wins, since its client was told so. */
async function finish(client: PoolClient, batch: Batch): Promise<void> {
  const { batch_id, deployment_name, workflow_id, cancel_requested_at } = batch;
  const { rows } = await client.query<Pick<Execution, 'item_id' | 'execution_id' | 'status'>>({
    ...ENDS,
    values: [batch_id],
  });
  const items = rows.map(({ item_id, execution_id, status }) => ({
    item_id: item_id ?? '',
    execution_id,
    status,
    self: executionLinks(execution_id).self,
  }));
  const status = cancel_requested_at ? 'cancelled' : 'completed';
  const finishedAt = new Date();
  const data = { counts: countOf(rows), items, results: batchLinks(batch_id).results };
  const chunk = serializeBatchChunk(
    new ChunkSerializer({ deployment_name, workflow_id, batch_id }),
    { type: 'status', data, status },
    { sequence: 2, time: finishedAt.getTime() },
  );
  await client.query({ ...FINISH, values: [batch_id, status, finishedAt, chunk] });
}

/** How many of some items are in each state. */
export function countOf(items: { status: Execution['status'] }[]): ItemCounts {
  const counts = { total: items.length, queued: 0, running: 0, completed: 0, error: 0, cancelled: 0 };
  for (const { status } of items) counts[status]++;
  return counts;
}

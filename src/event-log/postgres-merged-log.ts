import { setImmediate as nextTurn } from 'node:timers/promises';
import { Inject, Injectable, Logger } from '@nestjs/common';
import type { BeforeApplicationShutdown, OnApplicationShutdown } from '@nestjs/common';
import { Pool } from 'pg';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { GroupCommit } from '../database/group-commit.js';
import { SessionConnection } from '../database/session-connection.js';
import { retryWhileUnavailable } from '../database/unavailable.js';
import type { LogBatch } from './event-log.js';
import { follow } from './follow.js';
import type { StoredChunks } from './follow.js';
import { batchOf, trim } from './log-batch.js';
import { LogNotifier } from './log-notifier.js';
import { LogSubscriptions } from './log-subscriptions.js';
import { MergedLog } from './merged-log.js';
import { LAST_OF_BATCH, MergedOrder, appendRows, endOfOrder } from './merged-order.js';
import type { NewOrderRow, OrderRow, Range } from './merged-order.js';
import { Merger } from './merger.js';
import { cutOrder } from './order-repair.js';
import { READ_RANGES } from './statements.js';

/** What a catching-up reader takes at once, about: rows of the order, chunks, and bytes of them. */
const READ_ROWS = 32;
const READ_CHUNKS = 512;
const READ_BYTES = 64 * 1024;

const MEMBERS = {
  name: 'merged-log-members',
  text: 'SELECT execution_id FROM execution WHERE batch_id = $1 ORDER BY batch_index',
};

/** What the readers of one batch in this process share. */
interface SharedBatch {
  readers: number;
  order: MergedOrder;
  /** Logs of the batch and of its items; resolves once the merger has begun. */
  members: Promise<string[]>;
  merger?: Merger;
  /** Reads of the table that are about to begin, by position: readers that were woken together share one. */
  reads: Map<number, Promise<StoredChunks | undefined>>;
  stopped: AbortController;
}

/**
 * The merged log on PostgreSQL: whoever reads a batch stores the order in which its chunks are read, as ranges of
 * sequences. The chunks themselves stay where they are, and a batch that nobody reads costs nothing.
 */
@Injectable()
export class PostgresMergedLog extends MergedLog implements BeforeApplicationShutdown, OnApplicationShutdown {
  private readonly logger = new Logger(PostgresMergedLog.name);
  private readonly readers = new LogSubscriptions();
  private readonly batches = new Map<string, SharedBatch>();
  private readonly session: SessionConnection;
  private readonly appends = new GroupCommit<NewOrderRow, boolean>((rows) => appendRows(this.session, rows));

  constructor(
    private readonly pool: Pool,
    @Inject(CONFIG) private readonly config: ServerConfig,
    private readonly subscriptions: LogSubscriptions,
    private readonly notifier: LogNotifier,
  ) {
    super();
    this.session = new SessionConnection({
      connectionString: config.DATABASE_URL,
      kind: 'merged-order',
      setup: [`SET synchronous_commit = ${config.DURABLE_CHUNKS === 'true' ? 'on' : 'off'}`],
      onLost: (error) => {
        this.logger.warn(`The connection that stores the order of merged logs was lost: ${error.message}`);
        this.batches.forEach((batch, batchId) => this.fail(batchId, batch));
      },
    });
  }

  /** As with the event log: before the HTTP server waits for its connections. */
  beforeApplicationShutdown(): void {
    this.readers.closeAll();
  }

  async onApplicationShutdown(): Promise<void> {
    await this.session.close();
  }

  async *read(
    batchId: string,
    after: number,
    { signal, idleMs }: { signal: AbortSignal; idleMs?: number },
  ): AsyncGenerator<LogBatch, void, void> {
    const batch = this.enter(batchId);
    const subscription = this.readers.add(batchId);
    const catchUp = (cursor: number) => this.catchUp(batchId, batch, cursor, signal);
    try {
      yield* follow(subscription, after, { signal, idleMs, catchUp });
    } finally {
      this.readers.remove(batchId, subscription);
      this.leave(batchId, batch);
    }
  }

  ended(batchId: string): void {
    this.subscriptions.announce(batchId, LAST_OF_BATCH);
    this.notifier.announce([{ executionId: batchId, last: LAST_OF_BATCH }]);
  }

  end(batchId: string): Promise<{ position: number; isFinal: boolean }> {
    return endOfOrder(this.pool, batchId);
  }

  private enter(batchId: string): SharedBatch {
    const known = this.batches.get(batchId);
    if (known) {
      known.readers++;
      return known;
    }
    const order = new MergedOrder(this.pool, batchId);
    const stopped = new AbortController();
    const batch: SharedBatch = { readers: 1, order, stopped, reads: new Map(), members: Promise.resolve([]) };
    batch.members = this.retried(() => this.begin(batchId, batch), stopped.signal);
    batch.members.catch((error: unknown) => this.logger.debug(error)); // its readers are told
    this.batches.set(batchId, batch);
    return batch;
  }

  private leave(batchId: string, batch: SharedBatch): void {
    if (--batch.readers === 0) this.stop(batchId, batch);
  }

  /** Sends the readers of a batch away. Who comes from now on begins anew. */
  private fail(batchId: string, batch: SharedBatch): void {
    if (this.batches.get(batchId) !== batch) return;
    this.stop(batchId, batch);
    this.readers.close(batchId);
  }

  private stop(batchId: string, batch: SharedBatch): void {
    if (this.batches.get(batchId) === batch) this.batches.delete(batchId);
    batch.stopped.abort(new Error('The batch is not merged here any more.'));
    batch.merger?.stop();
  }

  private async begin(batchId: string, batch: SharedBatch): Promise<string[]> {
    const { rows } = await this.pool.query<{ execution_id: string }>({ ...MEMBERS, values: [batchId] });
    const members = [batchId, ...rows.map(({ execution_id }) => execution_id)];
    const { pool, subscriptions, readers, config } = this;
    const merger = new Merger({
      batchId,
      members,
      pool,
      order: batch.order,
      append: (row) => this.appends.add(row),
      subscriptions,
      readers,
      intervalMs: config.STREAM_FLUSH_INTERVAL_MS,
      onFailure: () => this.fail(batchId, batch),
    });
    // Before anything is read: what is known of the order holds as long as this connection does.
    await this.session.connected();
    batch.stopped.signal.throwIfAborted();
    batch.merger?.stop(); // an earlier try
    batch.merger = merger;
    const found = await merger.start();
    if (found === 'impossible') return this.repair(batchId, batch, members);
    if (found === 'deleted') this.fail(batchId, batch);
    return members;
  }

  /** An older build has stored what no log holds: takes it away, and begins with the rest. */
  private async repair(batchId: string, batch: SharedBatch, members: string[]): Promise<string[]> {
    const position = await cutOrder(this.pool, batchId, { members, cuts: batch.order.cuts });
    if (position !== undefined)
      this.logger.warn(
        { batchId, position },
        'The order of a merged log was cut, and is made again from there.',
      );
    return this.begin(batchId, batch);
  }

  /** What is stored after a position; undefined once `signal` aborted, or the batch is not merged here any more. */
  private async catchUp(
    batchId: string,
    batch: SharedBatch,
    cursor: number,
    signal: AbortSignal,
  ): Promise<StoredChunks | undefined> {
    let read = batch.reads.get(cursor);
    if (!read) {
      read = this.readAfter(batchId, batch, cursor);
      batch.reads.set(cursor, read);
    }
    try {
      return await unlessAborted(read, signal);
    } catch (error) {
      if (signal.aborted || batch.stopped.signal.aborted) return undefined;
      throw error;
    }
  }

  private async readAfter(
    batchId: string,
    batch: SharedBatch,
    cursor: number,
  ): Promise<StoredChunks | undefined> {
    const logs = await batch.members;
    await nextTurn();
    // Who comes from now on was woken by something that this read may not see.
    batch.reads.delete(cursor);
    const stored = await this.retried(async () => {
      const rows = await batch.order.after(cursor, READ_ROWS);
      if (!rows || (rows.length === 0 && (await this.isBeyond(batch, cursor)))) return undefined;
      return this.readStored(logs, rows, cursor);
    }, batch.stopped.signal);
    // The order, or what it holds, is not what it was: whoever comes next looks at both again.
    if (!stored) this.fail(batchId, batch);
    return stored;
  }

  /** Whether the order ends before a position, which was cut off. */
  private async isBeyond({ merger, order }: SharedBatch, cursor: number): Promise<boolean> {
    return cursor > (merger?.last ?? 0) && cursor > (await order.end()).position;
  }

  /** Undefined if the chunks were deleted, or never were. */
  private async readStored(
    members: string[],
    rows: OrderRow[],
    cursor: number,
  ): Promise<StoredChunks | undefined> {
    const { ranges, isCut } = rangesAfter(rows, cursor);
    if (ranges.length === 0) return { batch: undefined, more: false };
    const values = [
      `{${ranges.map(({ member }) => members[member]).join()}}`,
      `{${ranges.map(({ first }) => first).join()}}`,
      `{${ranges.map(({ last }) => last).join()}}`,
      READ_BYTES,
    ];
    const stored = await this.pool.query<StoredRange>({ ...READ_RANGES, values });
    const { chunks, isWhole } = chunksOf(ranges, stored.rows);
    if (chunks.length === 0) return undefined;
    const last = cursor + chunks.length;
    const end = ranges.at(-1);
    const terminal = isWhole && end?.member === 0 && end.last === LAST_OF_BATCH;
    const more = !terminal && (isCut || !isWhole || rows.length === READ_ROWS);
    return { batch: { first: cursor + 1, last, chunks, terminal }, more };
  }

  private retried<Result>(statement: () => Promise<Result>, signal: AbortSignal): Promise<Result> {
    return retryWhileUnavailable(statement, { signal, onRetry: (error) => this.logger.debug(error) });
  }
}

/** Settles as `promise` does, and at once when `signal` aborts. */
function unlessAborted<Result>(promise: Promise<Result>, signal: AbortSignal): Promise<Result> {
  return new Promise((resolve, reject) => {
    const onAbort = () => reject(signal.reason as Error);
    if (signal.aborted) return onAbort();
    signal.addEventListener('abort', onAbort);
    const settled = () => signal.removeEventListener('abort', onAbort);
    promise.then(resolve, reject).finally(settled);
  });
}

interface StoredRange {
  /** From 1 on, in the order in which they were asked for. */
  range: number;
  first_sequence: number;
  last_sequence: number;
  chunks: string;
}

/** The ranges of some rows after a position, about {@link READ_CHUNKS} chunks of them. */
function rangesAfter(rows: OrderRow[], cursor: number): { ranges: Range[]; isCut: boolean } {
  const ranges: Range[] = [];
  let total = 0;
  for (const row of rows) {
    let position = row.first_position - 1;
    for (const { member, first, last } of row.ranges) {
      const had = Math.max(0, cursor - position);
      position += last - first + 1;
      if (position <= cursor) continue;
      if (total >= READ_CHUNKS) return { ranges, isCut: true };
      ranges.push({ member, first: first + had, last });
      total += last - first - had + 1;
    }
  }
  return { ranges, isCut: false };
}

/** The chunks of the ranges as far as the rows have them without a gap. */
function chunksOf(ranges: Range[], rows: StoredRange[]): { chunks: string[]; isWhole: boolean } {
  const chunks: string[] = [];
  let at = 0;
  for (const [index, { first, last }] of ranges.entries()) {
    let next = first;
    for (let row = rows[at]; row?.range === index + 1; row = rows[++at]) {
      if (row.first_sequence > next) break;
      const batch = trim(batchOf(row), next - 1);
      chunks.push(...batch.chunks.slice(0, last + 1 - next));
      next = Math.min(row.last_sequence, last) + 1;
    }
    if (next <= last) return { chunks, isWhole: false };
  }
  return { chunks, isWhole: true };
}

import { Inject, Injectable, Logger } from '@nestjs/common';
import type { BeforeApplicationShutdown, OnApplicationShutdown } from '@nestjs/common';
import { Pool } from 'pg';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { GroupCommit, MOST_BYTES } from '../database/group-commit.js';
import { BUSY } from '../database/isolated-writes.js';
import { queryLarge } from '../database/query-at-length.js';
import { SessionConnection } from '../database/session-connection.js';
import { joinRows, jsonOf } from '../database/text-parameter.js';
import type { TextParameter } from '../database/text-parameter.js';
import { ClosedError, isOutage, retryWhileUnavailable } from '../database/unavailable.js';
import { isFinal } from '../executions/status.js';
import type { ExecutionStatus, TerminalStatus } from '../executions/status.js';
import { Metrics } from '../metrics.js';
import { EventLog } from './event-log.js';
import type { LogBatch, LogOwner, LogWriter } from './event-log.js';
import { follow } from './follow.js';
import type { StoredChunks } from './follow.js';
import { batchOf, join, trim } from './log-batch.js';
import { LogFlush } from './log-flush.js';
import { LogNotifier } from './log-notifier.js';
import type { LogPosition } from './log-notifier.js';
import { LogSubscriptions } from './log-subscriptions.js';
import { ExecutionLogWriter } from './log-writer.js';
import type { LogWriterHost, PendingRow, WrittenEnd } from './log-writer.js';
import { END, READ } from './statements.js';

/** Rows and bytes that a catching-up reader takes from the table at once. */
const READ_ROWS = 64;
const READ_BYTES = 64 * 1024;

/** Readers that share a statement at most. */
const SHARED_READS = 100;

interface ReadPosition {
  executionId: string;
  after: number;
}

interface ReadRow {
  /** From 1 on, in the order in which they were asked for. */
  reader: number;
  first_sequence: number;
  last_sequence: number;
  chunks: string;
}

interface EndedRow {
  execution_id: string;
  fence: number;
  /** Not a final one: somebody else holds a lock on the execution. */
  status: ExecutionStatus;
}

interface WriterEnd {
  writer: ExecutionLogWriter;
  end: WrittenEnd;
  /** `end.response` as JSON. */
  response: TextParameter;
}

/**
 * The event log on PostgreSQL: one row a flush and execution, one statement for all executions of the process.
 * Unless `DURABLE_CHUNKS` is set, chunks commit without waiting for the disk (a crash of PostgreSQL itself can lose the last
 * moments, but never leaves a gap), ends commit with it.
 */
@Injectable()
export class PostgresEventLog
  extends EventLog
  implements BeforeApplicationShutdown, OnApplicationShutdown, LogWriterHost
{
  private readonly logger = new Logger(PostgresEventLog.name);
  private readonly shutdown = new AbortController();
  private readonly ends: GroupCommit<WriterEnd, TerminalStatus | undefined>;
  private readonly reads = new GroupCommit<ReadPosition, StoredChunks>(
    (positions) => this.readStored(positions),
    { mostItems: SHARED_READS, isolates: (error) => !isOutage(error) },
  );
  private readonly flushes: LogFlush;
  private readonly session: SessionConnection;

  constructor(
    private readonly pool: Pool,
    @Inject(CONFIG) config: ServerConfig,
    private readonly metrics: Metrics,
    private readonly subscriptions: LogSubscriptions,
    private readonly notifier: LogNotifier,
  ) {
    super();
    this.session = new SessionConnection({
      connectionString: config.DATABASE_URL,
      kind: 'log',
      setup: [`SET synchronous_commit = ${config.DURABLE_CHUNKS === 'true' ? 'on' : 'off'}`],
      statementMs: config.DATABASE_TIMEOUT_MS,
    });
    this.flushes = new LogFlush({
      session: this.session,
      pool,
      metrics,
      intervalMs: config.STREAM_FLUSH_INTERVAL_MS,
      signal: this.shutdown.signal,
      committed: (rows) => this.committed(rows),
    });
    this.ends = new GroupCommit<WriterEnd, TerminalStatus | undefined>((items) => this.commitEnds(items), {
      bytesOf: ({ response, end }) =>
        Buffer.byteLength(response) + 3 * (end.chunk.length + end.cancelled_chunk.length),
      patience: { signal: this.shutdown.signal, onRetry: (error) => this.retried(error) },
      onSplit: () => metrics.splitGroups.inc({ statement: 'end' }),
    });
  }

  /** After the workers have drained, and before the HTTP server waits for its connections. */
  beforeApplicationShutdown(): void {
    this.subscriptions.closeAll();
  }

  /** Late, so that executions that end during the shutdown still get their last chunks in. */
  async onApplicationShutdown(): Promise<void> {
    this.shutdown.abort(new ClosedError('The event log is closed.'));
    await this.session.close();
  }

  open(owner: LogOwner): LogWriter {
    return new ExecutionLogWriter(owner, this);
  }

  async *stored(executionId: string): AsyncGenerator<LogBatch, void, void> {
    for (let after = 0; ;) {
      const [found] = await this.readStored([{ executionId, after }]);
      if (!found?.batch) return;
      yield found.batch;
      after = found.batch.last;
    }
  }

  async *read(
    executionId: string,
    after: number,
    { signal, idleMs }: { signal: AbortSignal; idleMs?: number },
  ): AsyncGenerator<LogBatch, void, void> {
    const subscription = this.subscriptions.add(executionId);
    const catchUp = (cursor: number, isFar: boolean) =>
      this.catchUp({ executionId, after: cursor }, { signal, isShared: !isFar });
    try {
      yield* follow(subscription, after, { signal, idleMs, catchUp });
    } finally {
      this.subscriptions.remove(executionId, subscription);
    }
  }

  schedule(writer: ExecutionLogWriter): void {
    this.flushes.request(writer);
  }

  async end(writer: ExecutionLogWriter, end: WrittenEnd): Promise<TerminalStatus | undefined> {
    return this.ends.add({ writer, end, response: await jsonOf(end.response) });
  }

  /**
   * What is stored after the cursor. Readers who had all of it before, and were woken by a notification or by the loss of the
   * connection for these, wait for little each, and share a statement: one for each of them would cost more than all the rest. Reads on when the database is back; undefined once `signal` aborted.
   */
  private async catchUp(
    from: ReadPosition,
    { signal, isShared }: { signal: AbortSignal; isShared: boolean },
  ): Promise<StoredChunks | undefined> {
    const onRetry = (error: unknown) => this.logger.debug(error);
    const read = async () => (isShared ? this.reads.add(from) : (await this.readStored([from]))[0]);
    try {
      return await retryWhileUnavailable(read, { signal, onRetry });
    } catch (error) {
      if (signal.aborted) return undefined;
      throw error;
    }
  }

  /** The next chunks of each reader from the table. */
  private async readStored(from: ReadPosition[]): Promise<StoredChunks[]> {
    const values = [
      `{${from.map(({ executionId }) => executionId).join()}}`,
      `{${from.map(({ after }) => after).join()}}`,
      READ_ROWS,
      READ_BYTES,
      MOST_BYTES,
    ];
    const { rows } = await this.pool.query<ReadRow>({ ...READ, values });
    const found = from.map(() => ({ batch: undefined as LogBatch | undefined, rows: 0, characters: 0 }));
    for (const row of rows) {
      const reader = found[row.reader - 1];
      const after = from[row.reader - 1]?.after;
      if (!reader || after === undefined) continue;
      reader.batch = join(reader.batch, trim(batchOf(row), after));
      reader.rows++;
      reader.characters += row.chunks.length;
    }
    // A character takes at most three bytes in UTF-8, so this errs on the side of one read too many.
    const isCut = found.reduce((sum, { characters }) => sum + characters, 0) * 3 >= MOST_BYTES;
    return found.map(({ batch, rows, characters }) => ({
      batch,
      more: isCut || rows >= READ_ROWS - 1 || characters * 3 >= READ_BYTES,
    }));
  }

  private committed(rows: PendingRow[]): void {
    const now = performance.now();
    const announced: LogPosition[] = [];
    let chunks = 0;
    for (const row of rows) {
      const { writer, batch, characters } = row;
      chunks += batch.chunks.length;
      writer.lastFlush = now;
      announced.push({ executionId: writer.owner.execution_id, last: batch.last });
      this.subscriptions.deliver(writer.owner.execution_id, batch, characters);
      writer.committed(row);
    }
    this.metrics.logChunks.inc(chunks);
    this.notifier.announce(announced);
  }

  private async commitEnds(asked: WriterEnd[]): Promise<(TerminalStatus | typeof BUSY | undefined)[]> {
    // Several writers of one attempt, as when several clients cancel at once what is still queued: one of them ends it.
    const chosen = new Map(asked.map((item) => [keyOf(item.writer.owner), item]));
    const items = [...chosen.values()];
    const ends = items.map(({ end }) => end);
    const values = [
      items.map(({ writer }) => writer.owner.execution_id),
      items.map(({ writer }) => writer.owner.fence),
      ends.map((end) => end.status),
      ends.map((end) => end.code ?? null),
      ends.map((end) => end.error ?? null),
      ends.map((end) => end.input_tokens),
      ends.map((end) => end.output_tokens),
      ends.map((end) => end.first_chunk_at ?? null),
      ends.map((end) => end.finished_at),
      ends.map((end) => end.sequence),
      joinRows(ends.map((end) => end.chunk)),
      joinRows(ends.map((end) => end.cancelled_chunk)),
      joinRows(items.map(({ response }) => response)),
    ];
    const { rows } = await queryLarge<EndedRow>(this.pool, { ...END, values });
    const ended = new Map(rows.map((row) => [keyOf(row), row.status]));
    const announced: LogPosition[] = [];
    for (const { writer, end } of items) {
      const executionId = writer.owner.execution_id;
      const status = ended.get(keyOf(writer.owner));
      if (!status || !isFinal(status)) continue;
      announced.push({ executionId, last: end.sequence });
      const chunk = status === end.status ? end.chunk : end.cancelled_chunk;
      const batch = { first: end.sequence, last: end.sequence, chunks: [chunk], terminal: true };
      this.subscriptions.deliver(executionId, batch, chunk.length);
    }
    this.metrics.logChunks.inc(announced.length);
    this.notifier.announce(announced);
    return asked.map((item) => {
      const key = keyOf(item.writer.owner);
      const status = chosen.get(key) === item ? ended.get(key) : undefined;
      return status && !isFinal(status) ? BUSY : status;
    });
  }

  private retried(error: unknown): void {
    this.metrics.logFlushFailures.inc();
    this.logger.warn(error);
  }
}

function keyOf({ execution_id, fence }: { execution_id: string; fence: number }): string {
  return `${execution_id}:${fence}`;
}

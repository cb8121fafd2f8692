import { Inject, Injectable, Logger } from '@nestjs/common';
import type { BeforeApplicationShutdown, OnApplicationShutdown } from '@nestjs/common';
import { Pool } from 'pg';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { GroupCommit } from '../database/group-commit.js';
import { SessionConnection } from '../database/session-connection.js';
import { ROW_SEPARATOR } from '../database/row-separator.js';
import { retryWhileUnavailable } from '../database/unavailable.js';
import type { TerminalStatus } from '../executions/status.js';
import { Metrics } from '../metrics.js';
import { EventLog } from './event-log.js';
import type { LogBatch, LogOwner, LogWriter } from './event-log.js';
import { FlushSchedule } from './flush-schedule.js';
import { follow } from './follow.js';
import type { StoredChunks } from './follow.js';
import { batchOf, join, trim } from './log-batch.js';
import { LogNotifier } from './log-notifier.js';
import type { LogPosition } from './log-notifier.js';
import { LogSubscriptions } from './log-subscriptions.js';
import { ExecutionLogWriter } from './log-writer.js';
import type { LogWriterHost, PendingRow, WrittenEnd } from './log-writer.js';
import { END, FLUSH, READ } from './statements.js';

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
  status: TerminalStatus;
}

interface WriterEnd {
  writer: ExecutionLogWriter;
  end: WrittenEnd;
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
  private readonly dirty = new Set<ExecutionLogWriter>();
  private readonly flushes = new FlushSchedule(() => this.flush());
  private readonly ends = new GroupCommit<WriterEnd, TerminalStatus | undefined>((items) =>
    this.commitEnds(items),
  );
  private readonly reads = new GroupCommit<ReadPosition, StoredChunks>(
    (positions) => this.readStored(positions),
    SHARED_READS,
  );
  private readonly shutdown = new AbortController();
  private readonly session: SessionConnection;

  constructor(
    private readonly pool: Pool,
    @Inject(CONFIG) private readonly config: ServerConfig,
    private readonly metrics: Metrics,
    private readonly subscriptions: LogSubscriptions,
    private readonly notifier: LogNotifier,
  ) {
    super();
    this.session = new SessionConnection({
      connectionString: config.DATABASE_URL,
      kind: 'log',
      setup: [`SET synchronous_commit = ${config.DURABLE_CHUNKS === 'true' ? 'on' : 'off'}`],
    });
  }

  /** After the workers have drained, and before the HTTP server waits for its connections. */
  beforeApplicationShutdown(): void {
    this.subscriptions.closeAll();
  }

  /** Late, so that executions that end during the shutdown still get their last chunks in. */
  async onApplicationShutdown(): Promise<void> {
    this.shutdown.abort(new Error('The event log is closed.'));
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
    const catchUp = (cursor: number, isUncertain: boolean) =>
      this.catchUp({ executionId, after: cursor }, { signal, isShared: !isUncertain });
    try {
      yield* follow(subscription, after, { signal, idleMs, catchUp });
    } finally {
      this.subscriptions.remove(executionId, subscription);
    }
  }

  schedule(writer: ExecutionLogWriter): void {
    this.dirty.add(writer);
    const wait = writer.urgent
      ? 0
      : writer.lastFlush + this.config.STREAM_FLUSH_INTERVAL_MS - performance.now();
    this.flushes.request(wait);
  }

  end(writer: ExecutionLogWriter, end: WrittenEnd): Promise<TerminalStatus | undefined> {
    return this.ends.add({ writer, end });
  }

  /**
   * What is stored after the cursor. Readers who were woken by a notification wait for little each, and share a statement: one
   * for each of them would cost more than all the rest. Reads on when the database is back; undefined once `signal` aborted.
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
    return found.map(({ batch, rows, characters }) => ({
      batch,
      more: rows >= READ_ROWS - 1 || characters * 3 >= READ_BYTES,
    }));
  }

  /** Writes what waits. It never rejects: while the database is away it tries again, and the producers are held by `drain`. */
  private async flush(): Promise<void> {
    const rows = this.takeRows();
    if (rows.length === 0) return;
    const stopTimer = this.metrics.logFlushDuration.startTimer();
    const values = [
      `{${rows.map(({ writer }) => writer.owner.execution_id).join()}}`,
      `{${rows.map(({ writer }) => writer.owner.fence).join()}}`,
      `{${rows.map(({ batch }) => batch.first).join()}}`,
      `{${rows.map(({ batch }) => batch.last).join()}}`,
      rows.map(({ text }) => text).join(ROW_SEPARATOR),
    ];
    try {
      const written = await this.retried(() =>
        this.session.query<{ execution_id: string }>({ ...FLUSH, values }),
      );
      stopTimer();
      this.settle(rows, new Set(written.rows.map((row) => row.execution_id)));
    } catch (error) {
      // The shutdown, or a defect: the chunks are not in the log, so these attempts must not go on; another one may.
      this.metrics.logFlushFailures.inc();
      if (!this.shutdown.signal.aborted) this.logger.error(error);
      rows.forEach(({ writer }) => writer.shutOut(error));
    }
  }

  /** A row of each execution: where two attempts of one write in this process, the statement's answer can't tell them apart. */
  private takeRows(): PendingRow[] {
    const rows = new Map<string, PendingRow>();
    for (const writer of this.dirty) {
      if (rows.has(writer.owner.execution_id)) continue;
      this.dirty.delete(writer);
      const row = writer.takeRow();
      if (row) rows.set(writer.owner.execution_id, row);
    }
    if (this.dirty.size > 0) this.flushes.request(0);
    return [...rows.values()];
  }

  private settle(rows: PendingRow[], written: Set<string>): void {
    const now = performance.now();
    // Of a row that was refused nobody may hear: others would wait for chunks that never come.
    const announced: LogPosition[] = [];
    let chunks = 0;
    for (const row of rows) {
      const { writer, batch, text } = row;
      if (!written.has(writer.owner.execution_id)) {
        writer.shutOut();
        continue;
      }
      chunks += batch.chunks.length;
      writer.lastFlush = now;
      announced.push({ executionId: writer.owner.execution_id, last: batch.last });
      this.subscriptions.deliver(writer.owner.execution_id, batch, text.length);
      writer.committed(row);
    }
    this.metrics.logChunks.inc(chunks);
    this.notifier.announce(announced);
  }

  private async commitEnds(asked: WriterEnd[]): Promise<(TerminalStatus | undefined)[]> {
    // Several writers of one attempt, as when several clients cancel at once what is still queued: one of them ends it.
    const chosen = new Map(asked.map((item) => [keyOf(item.writer.owner), item]));
    const items = [...chosen.values()];
    const ends = items.map(({ end }) => end);
    const values = [
      items.map(({ writer }) => writer.owner.execution_id),
      items.map(({ writer }) => writer.owner.fence),
      ends.map((end) => end.status),
      ends.map((end) => end.code ?? null),
      ends.map((end) => end.error?.replaceAll('\u0000', '\ufffd') ?? null), // `text` can't hold U+0000
      ends.map((end) => JSON.stringify(end.response)).join(ROW_SEPARATOR),
      ends.map((end) => end.input_tokens),
      ends.map((end) => end.output_tokens),
      ends.map((end) => end.first_chunk_at ?? null),
      ends.map((end) => end.finished_at),
      ends.map((end) => end.sequence),
      ends.map((end) => end.chunk).join(ROW_SEPARATOR),
      ends.map((end) => end.cancelled_chunk).join(ROW_SEPARATOR),
    ];
    const { rows } = await this.retried(() => this.pool.query<EndedRow>({ ...END, values }));
    const ended = new Map(rows.map((row) => [keyOf(row), row.status]));
    const announced: LogPosition[] = [];
    for (const { writer, end } of items) {
      const executionId = writer.owner.execution_id;
      const status = ended.get(keyOf(writer.owner));
      if (!status) continue;
      announced.push({ executionId, last: end.sequence });
      const chunk = status === end.status ? end.chunk : end.cancelled_chunk;
      const batch = { first: end.sequence, last: end.sequence, chunks: [chunk], terminal: true };
      this.subscriptions.deliver(executionId, batch, chunk.length);
    }
    this.metrics.logChunks.inc(announced.length);
    this.notifier.announce(announced);
    return asked.map((item) => {
      const key = keyOf(item.writer.owner);
      return chosen.get(key) === item ? ended.get(key) : undefined;
    });
  }

  private retried<Result>(statement: () => Promise<Result>): Promise<Result> {
    return retryWhileUnavailable(statement, {
      signal: this.shutdown.signal,
      onRetry: (error) => {
        this.metrics.logFlushFailures.inc();
        this.logger.warn(error);
      },
    });
  }
}

function keyOf({ execution_id, fence }: { execution_id: string; fence: number }): string {
  return `${execution_id}:${fence}`;
}

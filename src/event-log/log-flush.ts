import { Logger } from '@nestjs/common';
import type { Pool } from 'pg';
import { BUSY, IsolatedWrites } from '../database/isolated-writes.js';
import type { SessionConnection } from '../database/session-connection.js';
import { ROW_SEPARATOR } from '../database/text-parameter.js';
import type { Metrics } from '../metrics.js';
import { FlushSchedule } from './flush-schedule.js';
import type { ExecutionLogWriter, PendingRow } from './log-writer.js';
import { FLUSH, UNWRITTEN } from './statements.js';

/** Characters of one flush. Each takes three bytes of UTF-8 at most, so a statement stays below 4 MiB. */
const MOST_CHARACTERS = 1_310_720;

export interface LogFlushOptions {
  /** For the flushes themselves, one at a time. */
  session: SessionConnection;
  /** For what is tried again beside them. */
  pool: Pool;
  metrics: Metrics;
  /** ms between two flushes of one execution. */
  intervalMs: number;
  signal: AbortSignal;
  /** Rows that were committed just now. */
  committed: (rows: PendingRow[]) => void;
}

/**
 * Collects what the writers of this process have to say, and writes it: a row for each execution, one statement for all.
 * The first flush of an execution leaves at once, the next ones at its pace. A row that can't be written shuts out its own
 * writer only.
 */
export class LogFlush {
  private readonly logger = new Logger(LogFlush.name);
  private readonly dirty = new Set<ExecutionLogWriter>();
  private readonly schedule = new FlushSchedule(() => this.flush());
  private readonly writes: IsolatedWrites<PendingRow, boolean>;

  constructor(private readonly options: LogFlushOptions) {
    const { metrics, signal } = options;
    this.writes = new IsolatedWrites({
      commit: (rows, aside) => this.commit(rows, aside),
      written: (rows, results) => this.settle(rows, results),
      failed: (rows, error) => this.fail(rows, error),
      patience: { signal, onRetry: (error) => this.retried(error) },
      onSplit: () => metrics.splitGroups.inc({ statement: 'flush' }),
    });
  }

  /** The writer has chunks to flush. */
  request(writer: ExecutionLogWriter): void {
    this.dirty.add(writer);
    const wait = writer.urgent ? 0 : writer.lastFlush + this.options.intervalMs - performance.now();
    this.schedule.request(wait);
  }

  /** Never rejects: while the database is away it tries again, and the producers are held by `drain`. */
  private async flush(): Promise<void> {
    const rows = this.takeRows();
    if (rows.length > 0) await this.writes.write(rows);
  }

  /**
   * A row of each execution: where two attempts of one write in this process, the statement's answer can't tell them apart.
   * Who does not fit any more is among the first of the next flush.
   */
  private takeRows(): PendingRow[] {
    const rows = new Map<string, PendingRow>();
    let characters = 0;
    for (const writer of this.dirty) {
      if (characters >= MOST_CHARACTERS) break;
      if (rows.has(writer.owner.execution_id)) continue;
      this.dirty.delete(writer);
      const row = writer.takeRow(MOST_CHARACTERS - characters);
      if (!row) continue;
      rows.set(writer.owner.execution_id, row);
      characters += row.characters;
    }
    if (this.dirty.size > 0) this.schedule.request(0);
    return [...rows.values()];
  }

  /** @returns whether each row is in the log; `BUSY` if somebody holds a lock on its execution */
  private async commit(rows: PendingRow[], aside: boolean): Promise<(boolean | typeof BUSY)[]> {
    const { metrics } = this.options;
    const stopTimer = metrics.logFlushDuration.startTimer();
    const positions = [
      `{${rows.map(({ writer }) => writer.owner.execution_id).join()}}`,
      `{${rows.map(({ writer }) => writer.owner.fence).join()}}`,
      `{${rows.map(({ batch }) => batch.first).join()}}`,
    ];
    const text = rows.map(({ batch }) => batch.chunks.join('\n')).join(ROW_SEPARATOR);
    const values = [...positions, `{${rows.map(({ batch }) => batch.last).join()}}`, text];
    const written = await this.query({ ...FLUSH, values }, aside);
    stopTimer();
    metrics.logFlushRows.inc(written.size);
    metrics.logFlushBytes.inc(Buffer.byteLength(text));
    if (written.size === rows.length) return rows.map(() => true);
    const unwritten = await this.query({ ...UNWRITTEN, values: positions }, aside);
    return rows.map(({ writer: { owner } }) => {
      if (written.has(owner.execution_id)) return true;
      return unwritten.has(owner.execution_id) ? BUSY : false;
    });
  }

  /** Aside, a connection of the pool: the session's carries out one statement after the other. */
  private async query(
    statement: { name: string; text: string; values: string[] },
    aside: boolean,
  ): Promise<Set<string>> {
    const { session, pool } = this.options;
    const { rows } = aside
      ? await pool.query<{ execution_id: string }>(statement)
      : await session.query<{ execution_id: string }>(statement);
    return new Set(rows.map((row) => row.execution_id));
  }

  private settle(rows: PendingRow[], results: boolean[]): void {
    rows.filter((_row, index) => !results[index]).forEach(({ writer }) => writer.shutOut());
    const written = rows.filter((_row, index) => results[index]);
    if (written.length > 0) this.options.committed(written);
  }

  /** The shutdown, or a defect: the chunks are not in the log, so these attempts must not go on. */
  private fail(rows: PendingRow[], error: unknown): void {
    const { metrics, signal } = this.options;
    metrics.logFlushFailures.inc();
    if (!signal.aborted) {
      const executions = rows.map(({ writer }) => writer.owner.execution_id);
      this.logger.error({ execution_ids: executions, err: error });
    }
    rows.forEach(({ writer }) => writer.shutOut(error));
  }

  private retried(error: unknown): void {
    this.options.metrics.logFlushFailures.inc();
    this.logger.warn(error);
  }
}

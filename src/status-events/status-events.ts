import { Injectable, Logger } from '@nestjs/common';
import type { BeforeApplicationShutdown } from '@nestjs/common';
import { Pool } from 'pg';
import type { StatusEvent } from '../database/entities/status-event.entity.js';
import { exclusively } from '../database/exclusively.js';
import { AppError } from '../errors.js';
import { LOCKS } from '../database/locks.js';
import { SlowPool } from '../database/slow-pool.js';
import { isUnavailable, retryWhileUnavailable } from '../database/unavailable.js';
import { Metrics } from '../metrics.js';
import { OneByOne } from '../one-by-one.js';
import { Repeat } from '../repeat.js';
import { IS_KEPT, LOOK, NUMBERED_AT_ONCE, NUMBER_PENDING, READ, SNAPSHOT } from './statements.js';
import { fitIntoLine } from './status-event.js';
import type {
  SnapshotDeployment,
  SnapshotExecution,
  StatusChange,
  StatusFilter,
  StatusSnapshot,
} from './status-event.js';

/** How often a process that somebody watches looks for changes. */
const POLL_MS = 200;
/** Changes that a reader takes at once. */
const READ_ROWS = 500;
/** Pieces that are numbered in a row. */
const MOST_PIECES = 20;
/** Sequences that are looked through at once; there are about two of them for a change. */
const READ_SPAN = 20_000;
/** Different snapshots that wait for their turn. */
const MOST_SNAPSHOTS = 200;

/**
 * The changes of status in the order of their commits, for any number of readers. As with the event log, a reader is a
 * cursor on what is stored: it can go on in any process. Nothing is looked for while nobody reads.
 */
@Injectable()
export class StatusEvents implements BeforeApplicationShutdown {
  private readonly logger = new Logger(StatusEvents.name);
  /** Wakes a waiting reader. */
  private readonly waiting = new Set<() => void>();
  private head = 0;
  /** All changes after a sequence, up to the head. */
  private latest: { after: number; changes: StatusChange[] } | undefined;
  /** Snapshots that wait for their turn, by their filter: who asks for the same one meanwhile gets it, too. */
  private readonly snapshots = new Map<string, Promise<StatusSnapshot>>();
  private readonly polls = new Repeat(
    async () => {
      await this.look();
      if (this.waiting.size === 0) return false;
    },
    {
      everyMs: POLL_MS,
      onError: (error) => this.logger[isUnavailable(error) ? 'debug' : 'error'](error),
    },
  );
  /** All streams wait for numbers, and anybody can ask for many different snapshots: so no number waits for more than one of these. */
  private readonly numbering = new OneByOne();
  private readonly takingSnapshots = new OneByOne();
  private readonly farReads = new OneByOne();
  private waitingSnapshots = 0;
  /** Pieces of the table that are being read: who wants the same shares it. */
  private readonly pieces = new Map<string, Promise<StatusChange[]>>();
  private closed = false;

  constructor(
    private readonly pool: Pool,
    private readonly slowPool: SlowPool,
    private readonly metrics: Metrics,
  ) {}

  /** Ends every reader, those to come included. */
  beforeApplicationShutdown(): void {
    this.closed = true;
    void this.polls.stop();
    this.wake();
  }

  /** Where a reader begins that had the changes up to `after`: there, or at a snapshot if they are not kept any more. */
  async begin(filter: StatusFilter, after: number | undefined): Promise<number | StatusSnapshot> {
    if (after === undefined) return this.snapshot(filter);
    const { rowCount } = await this.pool.query({ ...IS_KEPT, values: [after] });
    return after === 0 || rowCount === 1 ? after : this.snapshot(filter);
  }

  /**
   * Yields what changes after a sequence, each change once. It reads on only when asked for more. An empty array is yielded
   * each time nothing came for `idleMs`. Returns when `signal` aborts and when the process shuts down.
   */
  async *read(
    filter: StatusFilter,
    after: number,
    { signal, idleMs }: { signal: AbortSignal; idleMs: number },
  ): AsyncGenerator<StatusChange[], void, void> {
    let cursor = after;
    while (!signal.aborted && !this.closed) {
      if (cursor >= this.head) {
        if (!(await this.news(cursor, { signal, idleMs }))) yield [];
        continue;
      }
      const { found, end } = await this.changes(filter, cursor, signal);
      cursor = end;
      if (found.length > 0) yield found;
    }
  }

  /**
   * Makes committed changes readable, in pieces with a transaction each, so that others get a turn in between; what is left of a
   * large backlog follows the next time. Readers do it as they go; while there are none, somebody must now and then.
   */
  async number(): Promise<void> {
    for (let piece = 0; piece < MOST_PIECES && !this.closed; piece++) {
      const { isAll } = await this.numberSome();
      if (isAll) return;
    }
  }

  /** Numbers a piece of what is pending. */
  private async numberSome(): Promise<{ head: number; isAll: boolean }> {
    const { head, numbered } = await this.inSequence<{ head: string; numbered: number }>(
      this.numbering,
      (query) => query(NUMBER_PENDING),
    );
    return { head: Number(head), isAll: numbered < NUMBERED_AT_ONCE };
  }

  private async snapshot(filter: StatusFilter): Promise<StatusSnapshot> {
    const key = JSON.stringify(valuesOf(filter));
    const waiting = this.snapshots.get(key);
    if (waiting) return waiting;
    if (this.waitingSnapshots >= MOST_SNAPSHOTS) {
      this.metrics.refusedSlowRequests.inc();
      throw tooManySnapshots();
    }
    this.waitingSnapshots++;
    const snapshot = this.takeSnapshot(filter, key).finally(() => {
      this.waitingSnapshots--;
      if (this.snapshots.get(key) === snapshot) this.snapshots.delete(key);
    });
    this.snapshots.set(key, snapshot);
    return snapshot;
  }

  /** It shows what is numbered after it, too, as long as more is pending than its statement numbers: then it is taken again. */
  private async takeSnapshot(filter: StatusFilter, key: string): Promise<StatusSnapshot> {
    for (;;) {
      if (this.closed) throw new AppError('unavailable', 'The server is shutting down.', { retryAfter: 1 });
      const row = await this.inSequence<SnapshotRow>(this.takingSnapshots, (query) => {
        this.snapshots.delete(key);
        return query(SNAPSHOT, valuesOf(filter));
      });
      if (row.numbered < NUMBERED_AT_ONCE) return fitIntoLine(snapshotOf(row));
      await this.number();
    }
  }

  /** One transaction at a time, of all processes; those of this process wait for each other without a connection. */
  private inSequence<Row extends object>(turns: OneByOne, work: Work<Row>): Promise<Row> {
    return turns.run(() =>
      exclusively(this.pool, LOCKS.sequence, (client) =>
        work(async (text, values) => (await client.query<Row>(text, values)).rows[0] as Row),
      ),
    );
  }

  /** What passes the filter after `after`, and how far was looked: a filter may let nothing of a month pass. */
  private async changes(
    filter: StatusFilter,
    after: number,
    signal: AbortSignal,
  ): Promise<{ found: StatusChange[]; end: number }> {
    const { latest } = this;
    if (latest && after >= latest.after) {
      const found = latest.changes.filter((change) => change.sequence > after && passes(change, filter));
      return { found, end: this.head };
    }
    const end = Math.min(after + READ_SPAN, this.head);
    const values = [...valuesOf(filter), after, end, READ_ROWS];
    try {
      const found = await retryWhileUnavailable(() => this.readPiece(values, { isFar: end < this.head }), {
        signal,
        onRetry: (error) => this.logger.debug(error),
      });
      return { found, end: found.length < READ_ROWS ? end : (found.at(-1)?.sequence ?? end) };
    } catch (error) {
      if (signal.aborted) return { found: [], end: after };
      throw error;
    }
  }

  /**
   * What is far back takes many pieces, of all who come back after an outage, say. They wait for each other here: the connections that
   * executions need are not for them, and of those for what may take long they have one.
   */
  private readPiece(values: unknown[], { isFar }: { isFar: boolean }): Promise<StatusChange[]> {
    const key = JSON.stringify(values);
    const known = this.pieces.get(key);
    if (known) return known;
    const statement = { ...READ, values };
    const read = async () => {
      if (this.closed) return [];
      const { rows } = isFar
        ? await this.slowPool.query<StatusEvent>(statement)
        : await this.pool.query<StatusEvent>(statement);
      return rows.map(changeOf);
    };
    const piece = (isFar ? this.farReads.run(read) : read()).finally(() => this.pieces.delete(key));
    this.pieces.set(key, piece);
    return piece;
  }

  /** Resolves true when there may be changes after `cursor`, and when `signal` aborts; false after `idleMs`. */
  private async news(cursor: number, options: { signal: AbortSignal; idleMs: number }): Promise<boolean> {
    if (this.head > cursor || this.closed || options.signal.aborted) return true;
    return new Promise((resolve) => {
      const settle = (heard: boolean) => {
        this.waiting.delete(wake);
        clearTimeout(timer);
        options.signal.removeEventListener('abort', wake);
        resolve(heard);
      };
      const wake = () => settle(true);
      const timer = setTimeout(() => settle(false), options.idleMs);
      options.signal.addEventListener('abort', wake);
      this.waiting.add(wake);
      this.polls.start();
    });
  }

  /** Finds out how far the changes go, and keeps the newest for all readers that had what came before. */
  private async look(): Promise<void> {
    const { rows } = await this.pool.query<{ pending: boolean; head: string }>(LOOK);
    const head = rows[0]?.pending ? (await this.numberSome()).head : Number(rows[0]?.head ?? 0);
    if (head <= this.head) return;
    const after = this.head;
    const values = [...valuesOf({ deployments: true }), after, head, READ_ROWS];
    const { rows: newest } = await this.pool.query<StatusEvent>({ ...READ, values });
    // Too many to keep, as after a time without readers: each reads on in the table.
    this.latest = newest.length < READ_ROWS ? { after, changes: newest.map(changeOf) } : undefined;
    this.head = head;
    this.wake();
  }

  private wake(): void {
    for (const wake of this.waiting) wake();
  }
}

type Work<Row> = (query: (text: string, values?: unknown[]) => Promise<Row>) => Promise<Row>;

/** As PostgreSQL says it: moments inside JSON and large numbers are text. */
interface SnapshotRow {
  sequence: string;
  numbered: number;
  timestamp: Date;
  queued: string;
  running: string;
  executions: (Omit<SnapshotExecution, 'created_at' | 'started_at'> & {
    created_at: string;
    started_at: string | null;
  })[];
  deployments: (Omit<SnapshotDeployment, 'last_executed_at'> & { last_executed_at: string | null })[] | null;
}

function tooManySnapshots(): AppError {
  return new AppError(
    'too_many_requests',
    `${MOST_SNAPSHOTS} different snapshots are being made already; try again in a moment.`,
    { retryAfter: 1 },
  );
}

function snapshotOf(row: SnapshotRow): StatusSnapshot {
  const date = (text: string | null) => (text === null ? undefined : new Date(text));
  return {
    type: 'snapshot',
    sequence: Number(row.sequence),
    timestamp: row.timestamp,
    queued: Number(row.queued),
    running: Number(row.running),
    executions: row.executions.map((execution) => ({
      ...execution,
      created_at: new Date(execution.created_at),
      started_at: date(execution.started_at),
    })),
    deployments: row.deployments?.map((deployment) => ({
      ...deployment,
      last_executed_at: date(deployment.last_executed_at),
    })),
  };
}

function passes(change: StatusChange, filter: StatusFilter): boolean {
  const { deployment_name, environment, workflow_id, status, deployments } = filter;
  return (
    (deployment_name === undefined || change.deployment_name === deployment_name) &&
    (environment === undefined || change.environment === environment) &&
    (workflow_id === undefined || change.workflow_id === workflow_id.toLowerCase()) &&
    (change.type === 'execution'
      ? status === undefined || status.includes(change.status)
      : deployments === true)
  );
}

function valuesOf(filter: StatusFilter): unknown[] {
  const { deployment_name, environment, workflow_id, status, deployments = false } = filter;
  return [deployment_name, environment, workflow_id, status && [...new Set(status)].toSorted(), deployments];
}

function changeOf(row: StatusEvent): StatusChange {
  return {
    type: row.execution_id === null ? 'deployment' : 'execution',
    execution_id: row.execution_id ?? undefined,
    status: row.status,
    attempts: row.attempts ?? undefined,
    code: row.code ?? undefined,
    deployment_id: row.deployment_id,
    deployment_name: row.deployment_name,
    environment: row.environment,
    workflow_id: row.workflow_id,
    sequence: Number(row.sequence),
    timestamp: row.created_at,
  };
}

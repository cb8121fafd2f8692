import { Injectable, Logger } from '@nestjs/common';
import type { BeforeApplicationShutdown } from '@nestjs/common';
import { Pool } from 'pg';
import type { StatusEvent } from '../database/entities/status-event.entity.js';
import { retryWhileUnavailable } from '../database/unavailable.js';
import { HEAD, IS_KEPT, LOCK, NUMBER_PENDING, READ, SNAPSHOT } from './statements.js';
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
  private poll: NodeJS.Timeout | undefined;
  private turn: Promise<unknown> = Promise.resolve();
  private closed = false;

  constructor(private readonly pool: Pool) {}

  /** Ends every reader, those to come included. */
  beforeApplicationShutdown(): void {
    this.closed = true;
    clearTimeout(this.poll);
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
      const { head } = this;
      const changes = await this.changes(filter, cursor, signal);
      const last = changes.at(-1)?.sequence ?? cursor;
      // What does not pass the filter is passed over once, not again at each look.
      cursor = changes.length < READ_ROWS ? Math.max(last, head) : last;
      if (changes.length > 0) yield changes;
      else if (!(await this.news(cursor, { signal, idleMs }))) yield [];
    }
  }

  /** Makes committed changes readable. Readers do it as they go; while there are none, somebody must now and then. */
  async number(): Promise<void> {
    await this.inSequence((query) => query(NUMBER_PENDING));
  }

  private async snapshot(filter: StatusFilter): Promise<StatusSnapshot> {
    const row = await this.inSequence<SnapshotRow>((query) => query(SNAPSHOT, valuesOf(filter)));
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

  /** One transaction at a time, of all processes; those of this process wait for each other without a connection. */
  private inSequence<Row extends object>(work: Work<Row>): Promise<Row> {
    const turn = this.turn.then(() => this.transaction(work));
    this.turn = turn.catch(() => undefined); // its caller is told; the next one has its turn
    return turn;
  }

  private async transaction<Row extends object>(work: Work<Row>): Promise<Row> {
    const client = await this.pool.connect();
    let failure: Error | undefined;
    try {
      await client.query('BEGIN');
      await client.query(LOCK);
      const row = await work(async (text, values) => (await client.query<Row>(text, values)).rows[0] as Row);
      await client.query('COMMIT');
      return row;
    } catch (error) {
      failure = error instanceof Error ? error : new Error(String(error));
      throw error;
    } finally {
      client.release(failure); // a connection with a broken transaction is not used again
    }
  }

  private async changes(filter: StatusFilter, after: number, signal: AbortSignal): Promise<StatusChange[]> {
    const values = [...valuesOf(filter), after, READ_ROWS];
    try {
      const { rows } = await retryWhileUnavailable(() => this.pool.query<StatusEvent>({ ...READ, values }), {
        signal,
        onRetry: (error) => this.logger.debug(error),
      });
      return rows.map(changeOf);
    } catch (error) {
      if (signal.aborted) return [];
      throw error;
    }
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
      this.schedulePoll();
    });
  }

  private schedulePoll(): void {
    this.poll ??= setTimeout(() => {
      this.look()
        .catch((error: unknown) => this.logger.warn(error))
        .finally(() => {
          this.poll = undefined;
          if (this.waiting.size > 0 && !this.closed) this.schedulePoll();
        });
    }, POLL_MS);
  }

  private async look(): Promise<void> {
    const { rows } = await this.pool.query<{ pending: boolean; head: string }>(HEAD);
    const [found] = rows;
    if (found?.pending) {
      await this.number();
      return this.look();
    }
    const head = Number(found?.head ?? 0);
    if (head <= this.head) return;
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
  timestamp: Date;
  queued: string;
  running: string;
  executions: (Omit<SnapshotExecution, 'created_at' | 'started_at'> & {
    created_at: string;
    started_at: string | null;
  })[];
  deployments: (Omit<SnapshotDeployment, 'last_executed_at'> & { last_executed_at: string | null })[] | null;
}

function valuesOf(filter: StatusFilter): unknown[] {
  const { deployment_name, environment, workflow_id, status, deployments = false } = filter;
  return [deployment_name, environment, workflow_id, status, deployments];
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

import { Inject, Injectable, Logger } from '@nestjs/common';
import type { OnApplicationShutdown } from '@nestjs/common';
import { Pool } from 'pg';
import type { PoolClient, QueryResult, QueryResultRow } from 'pg';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { AppError } from '../errors.js';
import { Metrics } from '../metrics.js';
import { sessionConfig } from './session.js';
import { withClient } from './with-client.js';

/** Seconds after which a client that was refused may try again. */
const RETRY_AFTER_S = 5;
/** SQLSTATE of a statement that PostgreSQL ended for its time limit. */
const QUERY_CANCELED = '57014';

export interface SlowStatement {
  name?: string;
  text: string;
  values: unknown[];
}

/**
 * Connections for what may read or delete much at once, so that it can't take those that executions need. Each statement has
 * `DATABASE_SLOW_TIMEOUT_MS`; who finds no connection free waits for its turn.
 */
@Injectable()
export class SlowPool implements OnApplicationShutdown {
  private readonly logger = new Logger(SlowPool.name);
  private readonly pool: Pool;
  /** Begin of whoever waits, the one that came first at the front. */
  private readonly waiting = new Set<() => void>();
  private free: number;
  private waitingRequests = 0;
  private readonly inUse = new Set<PoolClient>();
  /** Questions that are not answered yet, by the statement with its values. */
  private readonly asked = new Map<string, Promise<QueryResult>>();

  constructor(
    @Inject(CONFIG) private readonly config: ServerConfig,
    private readonly metrics: Metrics,
  ) {
    this.free = config.DATABASE_SLOW_POOL_SIZE;
    this.pool = new Pool({
      ...sessionConfig(config.DATABASE_URL, { kind: 'slow', statementMs: config.DATABASE_SLOW_TIMEOUT_MS }),
      max: config.DATABASE_SLOW_POOL_SIZE,
    });
    // Without a listener, an idle connection that the server closes would end the process.
    this.pool.on('error', (error) =>
      this.logger.warn(`An idle database connection was lost: ${error.message}`),
    );
  }

  /** All requests are answered: what goes on still is the server's own work, which can be cut off anywhere. */
  async onApplicationShutdown(): Promise<void> {
    for (const client of this.inUse) void client.end();
    await this.pool.end();
  }

  /**
   * The question of a request. Whoever asks the same before the answer is there shares it. Rejects as pg does, with
   * `too_many_requests` if `DATABASE_SLOW_QUEUE` questions wait already or its turn does not come within
   * `DATABASE_TIMEOUT_MS`, and with `unavailable` if the statement takes too long.
   */
  ask<Row extends QueryResultRow>(statement: SlowStatement): Promise<QueryResult<Row>> {
    const key = JSON.stringify([statement.text, statement.values]);
    const asked = this.asked.get(key);
    if (asked) return asked as Promise<QueryResult<Row>>;
    const answer = this.answer<Row>(statement).finally(() => this.asked.delete(key));
    this.asked.set(key, answer);
    return answer;
  }

  /** A statement of the server's own work, which waits for its turn as long as it takes. Rejects as pg does. */
  query<Row extends QueryResultRow>(statement: SlowStatement): Promise<QueryResult<Row>> {
    return this.withClient((client) => client.query<Row>(statement));
  }

  /** The same with a connection of its own. One on which anything failed is not used again. */
  async withClient<Result>(work: (client: PoolClient) => Promise<Result>): Promise<Result> {
    if (this.free > 0) this.free--;
    else await new Promise<void>((resolve) => this.queue(resolve));
    return this.inTurn(work);
  }

  private async answer<Row extends QueryResultRow>(statement: SlowStatement): Promise<QueryResult<Row>> {
    if (this.free > 0) this.free--;
    else await this.turnOfRequest();
    try {
      return await this.inTurn((client) => client.query<Row>(statement));
    } catch (error) {
      if (!(error instanceof Error && 'code' in error && error.code === QUERY_CANCELED)) throw error;
      const seconds = this.config.DATABASE_SLOW_TIMEOUT_MS / 1000;
      throw new AppError(
        'unavailable',
        `The answer was not found within ${seconds} s. Ask for less at once.`,
        {
          retryAfter: RETRY_AFTER_S,
          cause: error,
        },
      );
    }
  }

  private async inTurn<Result>(work: (client: PoolClient) => Promise<Result>): Promise<Result> {
    try {
      return await withClient(this.pool, async (client) => {
        this.inUse.add(client);
        return work(client).finally(() => this.inUse.delete(client));
      });
    } finally {
      // Whoever comes first takes the place over.
      const [next] = this.waiting;
      if (next) next();
      else this.free++;
    }
  }

  private turnOfRequest(): Promise<void> {
    const most = this.config.DATABASE_SLOW_QUEUE;
    if (this.waitingRequests >= most) throw this.refuse(`${most} such requests wait already`);
    this.waitingRequests++;
    return new Promise((resolve, reject) => {
      const begin = this.queue(() => {
        clearTimeout(patience);
        this.waitingRequests--;
        resolve();
      });
      const patience = setTimeout(() => {
        this.leave(begin);
        this.waitingRequests--;
        reject(this.refuse('it waited long enough for those before it'));
      }, this.config.DATABASE_TIMEOUT_MS);
    });
  }

  private queue(onTurn: () => void): () => void {
    const begin = () => {
      this.leave(begin);
      onTurn();
    };
    this.waiting.add(begin);
    this.metrics.slowStatementsWaiting.set(this.waiting.size);
    return begin;
  }

  private leave(begin: () => void): void {
    this.waiting.delete(begin);
    this.metrics.slowStatementsWaiting.set(this.waiting.size);
  }

  private refuse(reason: string): AppError {
    this.metrics.refusedSlowRequests.inc();
    return new AppError(
      'too_many_requests',
      `Requests that read much are answered a few at a time, and ${reason}. Try again later.`,
      { retryAfter: RETRY_AFTER_S },
    );
  }
}

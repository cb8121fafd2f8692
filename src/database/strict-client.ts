import { Client } from 'pg';
import type { ClientConfig } from 'pg';

/** How much longer than PostgreSQL itself a client waits, ms: a server that hangs can't end its statements. */
const MARGIN_MS = 500;

/** Limits of a connection: PostgreSQL ends a statement after `ms`, and if it does not even do that, the connection is given up. */
export function timeLimits(ms: number): Pick<ClientConfig, 'statement_timeout' | 'query_timeout'> {
  return { statement_timeout: ms, query_timeout: ms + MARGIN_MS };
}

/**
 * A connection that ends itself when a statement was not answered in time. pg leaves it open, and waits with everything
 * that comes after it: a ROLLBACK that is never sent leaves a transaction open for whoever gets the connection next.
 */
export class StrictClient extends Client {
  constructor(config?: ClientConfig) {
    super(config);
    const query = this.query.bind(this) as (...parameters: unknown[]) => unknown;
    const strict = (...parameters: unknown[]): unknown => {
      const result = query(...parameters);
      // Callers with a callback are pools, which do the same.
      if (result instanceof Promise) result.catch((error: unknown) => this.endIfTimedOut(error));
      return result;
    };
    this.query = strict as Client['query'];
  }

  private endIfTimedOut(error: unknown): void {
    if (error instanceof Error && error.message === 'Query read timeout') void this.end();
  }
}

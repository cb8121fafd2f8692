import type { Client, QueryConfig, QueryResult, QueryResultRow } from 'pg';
import { sessionConfig } from './session.js';
import type { SessionKind } from './session.js';
import { StrictClient } from './strict-client.js';

/** ms that a statement may take, if the options don't say: a connection that nothing comes through must be made again. */
const STATEMENT_MS = 10_000;

export interface SessionConnectionOptions {
  connectionString: string;
  kind: SessionKind;
  /** Statements that every new connection begins with. */
  setup: string[];
  /** ms that a statement may take; 10 s if left out. */
  statementMs?: number;
  /** Called with each connection after its setup, the first one included. */
  onConnect?: (client: Client) => void;
  /** Called when an established connection is lost. */
  onLost?: (error: Error) => void;
}

/** One connection with a state of its own (settings, LISTEN), made when it is first needed and made again after a loss. */
export class SessionConnection {
  private current: Promise<Client> | undefined;
  private closed = false;

  constructor(private readonly options: SessionConnectionOptions) {}

  /** Rejects as pg does, and after `statementMs` without an answer; the next call then makes a new connection. */
  async query<Row extends QueryResultRow>(query: QueryConfig): Promise<QueryResult<Row>> {
    const client = await this.connected();
    return client.query<Row>(query);
  }

  /** Resolves with the connection once it is set up. */
  connected(): Promise<Client> {
    if (this.closed) return Promise.reject(new Error('The connection is closed.'));
    if (!this.current) {
      const current: Promise<Client> = this.connect(() => this.forget(current));
      this.current = current;
      current.catch(() => this.forget(current)); // the caller sees the rejection, the next one tries anew
    }
    return this.current;
  }

  async close(): Promise<void> {
    this.closed = true;
    const current = this.current;
    this.current = undefined;
    const client = await current?.catch(() => undefined); // a connection that was never made needs no end
    await client?.end();
  }

  private async connect(forget: () => boolean): Promise<Client> {
    const { connectionString, kind, setup, onConnect, statementMs = STATEMENT_MS } = this.options;
    const client = new StrictClient(sessionConfig(connectionString, { kind, statementMs }));
    const lost = (error: Error) => {
      if (forget() && !this.closed) this.options.onLost?.(error);
    };
    client.on('error', lost);
    client.on('end', () => lost(new Error('Connection terminated')));
    try {
      await client.connect();
      for (const statement of setup) await client.query(statement);
    } catch (error) {
      void client.end();
      throw error;
    }
    onConnect?.(client);
    return client;
  }

  private forget(connection: Promise<Client>): boolean {
    if (this.current !== connection) return false;
    this.current = undefined;
    return true;
  }
}

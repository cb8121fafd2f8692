import type { ClientConfig } from 'pg';
import { timeLimits } from './strict-client.js';

/** ms until an unreachable server counts as away. */
export const CONNECT_TIMEOUT_MS = 4000;

/** Parts of the server that have connections of their own, as `pg_stat_activity` names them: `agent-studio`, `agent-studio/log` … */
export type SessionKind =
  'leases' | 'log' | 'merged-order' | 'migration' | 'notifications' | 'queue' | 'resources' | 'slow';

/** What every name of ours begins with, that of older builds included. */
export const APPLICATION_NAME = 'agent-studio';

/**
 * What the statements were written for. Without it, the server's own settings would count, and those that somebody gave to the
 * database or to the role (`ALTER DATABASE … SET`): a date would be read wrong, or a table not be found. `lock_timeout` is off since a
 * wait for a lock counts for `statement_timeout`.
 */
const LANGUAGE = {
  DateStyle: 'ISO,MDY',
  IntervalStyle: 'postgres',
  TimeZone: 'UTC',
  bytea_output: 'hex',
  extra_float_digits: 1,
  client_encoding: 'UTF8',
  standard_conforming_strings: 'on',
  array_nulls: 'on',
  transform_null_equals: 'off',
  search_path: '"$user",public',
  default_transaction_isolation: 'read committed',
  default_transaction_read_only: 'off',
  default_transaction_deferrable: 'off',
  lock_timeout: 0,
  idle_session_timeout: 0,
};

/**
 * A client that is gone without a word, or that is stopped and reads nothing, is cut off by PostgreSQL: its transaction would hold
 * its locks, and a listener that takes nothing keeps every notification of the whole server until there is no room for another.
 */
const PEER = {
  tcp_user_timeout: '30s',
  tcp_keepalives_idle: '10s',
  tcp_keepalives_interval: '5s',
  tcp_keepalives_count: 4,
};

/** A transaction between two of whose statements its process was stopped, ms. It holds locks that others wait for. */
const IDLE_IN_TRANSACTION_MS = 5000;

/** What pg is given for a connection, or for a pool of them. */
export interface Session extends Pick<ClientConfig, 'statement_timeout' | 'query_timeout'> {
  connectionString: string;
  options: string;
  application_name: string;
  connectionTimeoutMillis: number;
  keepAlive: boolean;
}

export interface SessionOptions {
  kind?: SessionKind;
  /** ms that a statement may take; without it, as long as it likes. */
  statementMs?: number;
  /** ms that a transaction may wait for its next statement. */
  idleInTransactionMs?: number;
  /** Leaves the `search_path` as the database and the role have it. */
  foreignPath?: boolean;
}

/**
 * How every connection of the server is made: its settings are those above, whatever the server, the database or the role have. What
 * the `options` of the URL say comes last and counts, since it is said to us.
 */
export function sessionConfig(
  url: string,
  { kind, statementMs, idleInTransactionMs = IDLE_IN_TRANSACTION_MS, foreignPath }: SessionOptions = {},
): Session {
  const { connectionString, options } = withoutOptions(url);
  const settings = {
    ...LANGUAGE,
    ...PEER,
    statement_timeout: statementMs ?? 0,
    idle_in_transaction_session_timeout: idleInTransactionMs,
  };
  const entries = Object.entries(settings).filter(([name]) => !foreignPath || name !== 'search_path');
  const words = entries.map(([name, value]) => `-c ${name}=${escape(String(value))}`);
  return {
    connectionString,
    options: [...words, options].join(' ').trim(),
    application_name: kind ? `${APPLICATION_NAME}/${kind}` : APPLICATION_NAME,
    connectionTimeoutMillis: CONNECT_TIMEOUT_MS,
    keepAlive: true,
    ...(statementMs === undefined ? {} : timeLimits(statementMs)),
  };
}

/** In the `options` of a connection a space ends a word. */
function escape(value: string): string {
  return value.replace(/[\\ ]/g, '\\$&');
}

/** pg would take those of the URL in place of ours. */
function withoutOptions(url: string): { connectionString: string; options: string } {
  const parsed = new URL(url);
  const options = parsed.searchParams.get('options');
  if (options === null) return { connectionString: url, options: '' };
  parsed.searchParams.delete('options');
  return { connectionString: parsed.href, options };
}

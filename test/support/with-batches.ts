import { randomUUID } from 'node:crypto';
import { BatchRoutes } from './batches.js';
import { CallLedger, markerOf } from './call-ledger.js';
import { withStudio } from './with-studio.js';

/**
 * {@link withStudio} for tests of batches: a process that runs them, another one on the same database that runs nothing
 * itself, and a model that keeps account of its calls.
 */
export function withBatches(env: Record<string, string> = {}) {
  const ledger = new CallLedger();
  const server = withStudio({ env, upstream: ledger, others: { api: { ROLE: 'api' } } });
  const { api } = server.others;
  return {
    ledger,
    server,
    api,
    batches: new BatchRoutes(server.studio),
    /** By the process that runs nothing: all that it knows it has heard or read. */
    elsewhere: new BatchRoutes(api.studio),
    /** The calls of these queries. */
    callsOf: (queries: string[]) => ledger.calls.filter(({ marker }) => queries.includes(marker)),
  };
}

/** Queries that no other batch has. */
export function queriesOf(count: number): string[] {
  const name = randomUUID();
  return Array.from({ length: count }, (_, index) => markerOf(`${name}-${index}`));
}

export const itemsOf = (queries: string[]) => queries.map((query) => ({ query }));

import { setTimeout as sleep } from 'node:timers/promises';

const FIRST_DELAY_MS = 50;
const LONGEST_DELAY_MS = 1000;

/** SQLSTATE classes and codes of a server that is away, starting, stopping, out of resources or out of time (PostgreSQL, appendix A). */
const UNAVAILABLE_SQLSTATE = /^(08|53|58|57P0[1-5]|57014|40001|40P01|55P03|25006|25P0[34])/;
const UNAVAILABLE_NETWORK = new Set([
  'ECONNREFUSED',
  'ECONNRESET',
  'EPIPE',
  'ETIMEDOUT',
  'ENOENT',
  'EHOSTUNREACH',
  'ENOTFOUND',
  'EAI_AGAIN',
]);
/** What `pg` says without a code, and what PostgreSQL says once on each connection after a migration. */
const UNAVAILABLE_MESSAGE =
  /^(Connection terminated|timeout e|Client (has encountered|was closed)|Query read timeout|cached plan must not change)/;

/** True if the database could not be reached or was not able to work, so that the same statement may succeed later. */
export function isUnavailable(error: unknown): boolean {
  if (error instanceof AggregateError) return error.errors.some(isUnavailable);
  if (!(error instanceof Error)) return false;
  const code = 'code' in error && typeof error.code === 'string' ? error.code : undefined;
  if (code !== undefined && (UNAVAILABLE_SQLSTATE.test(code) || UNAVAILABLE_NETWORK.has(code))) return true;
  return UNAVAILABLE_MESSAGE.test(error.message) || isUnavailable(error.cause);
}

/**
 * Repeats an idempotent `statement` while the database is away, less and less often. Rejects with the signal's reason
 * when it aborts, and with the statement's error when that is a defect and not the database's absence.
 */
export async function retryWhileUnavailable<Result>(
  statement: () => Promise<Result>,
  options: { signal: AbortSignal; onRetry: (error: unknown) => void },
): Promise<Result> {
  for (let delay = FIRST_DELAY_MS; ; delay = Math.min(delay * 2, LONGEST_DELAY_MS)) {
    options.signal.throwIfAborted();
    try {
      return await statement();
    } catch (error) {
      if (!isUnavailable(error)) throw error;
      options.onRetry(error);
    }
    await sleep(delay, undefined, { signal: options.signal }).catch(() => undefined); // an abort is thrown above
  }
}

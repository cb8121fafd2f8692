import { setTimeout as sleep } from 'node:timers/promises';

const FIRST_DELAY_MS = 50;
const LONGEST_DELAY_MS = 1000;

/**
 * SQLSTATE classes and codes of a server that is away, starting, stopping or out of resources, and of one that ended the
 * connection (PostgreSQL, appendix A).
 */
const OUTAGE_SQLSTATE = /^(08|53[134]|58|57P0[1-5]|25006|25P0[34])/;
/** A limit of time or memory was reached, and not by the server as a whole: the statement itself may be to blame, or what it waits for. */
const SLOW_SQLSTATE = /^(57014|55P03|53200)/;
/** Serialization failures and deadlocks: the same statement succeeds when it is run again. */
const CONFLICT_SQLSTATE = /^(40001|40P01)/;
const OUTAGE_NETWORK = new Set([
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
const OUTAGE_MESSAGE =
  /^(Connection terminated|timeout e|Client (has encountered|was closed)|cached plan must not change)/;
const SLOW_MESSAGE = /^Query read timeout/;

/** The process shuts down: nothing can be written any more, and nothing is wrong with what was to be. */
export class ClosedError extends Error {
  override name = 'ClosedError';
}

/** Something could not be written however often it was tried, while others of its kind were. `cause` is the last failure. */
export class NeverWrittenError extends Error {
  override name = 'NeverWrittenError';
}

/** True if the connection was lost or refused, or the server can't work for anybody. Whose statement it was doesn't matter. */
export function isOutage(error: unknown): boolean {
  return (
    matches(error, (code) => OUTAGE_SQLSTATE.test(code) || OUTAGE_NETWORK.has(code), OUTAGE_MESSAGE) ||
    isNotificationQueueFull(error)
  );
}

/** True if nothing can be notified since some listener does not take what was. Its SQLSTATE (54000) stands for other limits, too. */
export function isNotificationQueueFull(error: unknown): boolean {
  return error instanceof Error && 'routine' in error && error.routine === 'PreCommit_Notify';
}

/** True if a statement met its limit: the server works, and smaller statements, or the same one later, may succeed. */
export function isSlow(error: unknown): boolean {
  return matches(error, (code) => SLOW_SQLSTATE.test(code), SLOW_MESSAGE);
}

/** True if the same statement succeeds later: an outage, a statement that met its limit, or a conflict with another one. */
export function isUnavailable(error: unknown): boolean {
  return isOutage(error) || isSlow(error) || matches(error, (code) => CONFLICT_SQLSTATE.test(code));
}

/** Looks at an error and at what caused it. */
function matches(error: unknown, hasCode: (code: string) => boolean, message?: RegExp): boolean {
  if (error instanceof AggregateError) return error.errors.some((one) => matches(one, hasCode, message));
  if (!(error instanceof Error) || error instanceof NeverWrittenError) return false;
  if ('code' in error && typeof error.code === 'string' && hasCode(error.code)) return true;
  return message?.test(error.message) === true || matches(error.cause, hasCode, message);
}

interface Repeats {
  signal: AbortSignal;
  onRetry: (error: unknown) => void;
}

/**
 * Repeats an idempotent `statement` while the database is away or busy, less and less often. Rejects with the signal's
 * reason when it aborts, and with the statement's error when that is a defect and not the database's absence.
 */
export function retryWhileUnavailable<Result>(
  statement: () => Promise<Result>,
  repeats: Repeats,
): Promise<Result> {
  return retryWhile(isUnavailable, statement, repeats);
}

/** As {@link retryWhileUnavailable}, for errors that `isPassing` holds of. */
export async function retryWhile<Result>(
  isPassing: (error: unknown) => boolean,
  statement: () => Promise<Result>,
  { signal, onRetry }: Repeats,
): Promise<Result> {
  for (let delay = FIRST_DELAY_MS; ; delay = Math.min(delay * 2, LONGEST_DELAY_MS)) {
    signal.throwIfAborted();
    try {
      return await statement();
    } catch (error) {
      if (!isPassing(error)) throw error;
      onRetry(error);
    }
    await sleep(delay, undefined, { signal }).catch(() => undefined); // an abort is thrown above
  }
}

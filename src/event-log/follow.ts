import type { LogBatch } from './event-log.js';
import type { LogSubscription } from './log-subscriptions.js';

/** `more`: the read was cut, there may be further rows. */
export interface StoredChunks {
  batch: LogBatch | undefined;
  more: boolean;
}

/**
 * Yields what comes after `after`: what was handed to the subscription, and by `catchUp` what is stored. Returns after a
 * terminal batch, when `signal` aborts, when the subscription is closed, and when `catchUp` resolves with undefined. An empty
 * batch is yielded each time nothing came for `idleMs`.
 */
export async function* follow(
  subscription: LogSubscription,
  after: number,
  options: {
    signal: AbortSignal;
    idleMs?: number;
    catchUp: (cursor: number, isFar: boolean) => Promise<StoredChunks | undefined>;
  },
): AsyncGenerator<LogBatch, void, void> {
  const { signal, idleMs, catchUp } = options;
  // Readers share statements: one with a bad position would take the others with it.
  if (!Number.isSafeInteger(after)) throw new TypeError(`${after} is no position of a log.`);
  let cursor = after;
  /** Much may be stored after the cursor. */
  let isFar = true;
  while (!signal.aborted && !subscription.closed) {
    let batch = subscription.take(cursor);
    if (!batch && subscription.isBehind(cursor)) {
      subscription.beginCatchUp(cursor);
      const stored = await catchUp(cursor, isFar);
      if (!stored || subscription.closed) return;
      isFar = stored.more;
      if (isFar) subscription.invalidate();
      batch = stored.batch;
    }
    if (batch) {
      cursor = batch.last;
      yield batch;
      if (batch.terminal) return;
    } else if (!(await subscription.news(cursor, { signal, idleMs }))) {
      yield { first: cursor + 1, last: cursor, chunks: [], terminal: false };
    }
  }
}

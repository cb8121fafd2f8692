import { setTimeout as sleep } from 'node:timers/promises';
import type { MessageEvent } from '@nestjs/common';
import type { LogBatch } from '../event-log/event-log.js';

/**
 * Characters that are sent at once. The next piece follows an interval later, so that a client whose code takes each
 * read for whole lines, as many do, gets whole lines: reads are of 64 KiB.
 */
export const MOST_CHARACTERS = 48 * 1024;

/**
 * The chunks of a log as events `<id>:<position>`, at most so many at once and so often as the pace allows (one array in
 * `intervalMs`); a comment for each empty batch. It ends when the log does, and when `signal` aborts.
 */
export async function* chunkEvents(
  batches: AsyncIterable<LogBatch>,
  { id, intervalMs, signal }: { id: string; intervalMs: number; signal: AbortSignal },
): AsyncGenerator<MessageEvent[], void, void> {
  let sentAt = -Infinity;
  for await (const batch of batches) {
    if (batch.chunks.length === 0) yield [{ comment: 'heartbeat' }];
    for (let position = batch.first; position <= batch.last;) {
      const early = sentAt + intervalMs - performance.now();
      if (early >= 1) await pause(early, signal);
      if (signal.aborted) return;
      const events = eventsOf(batch, position, id);
      position += events.length;
      // `started` alone does not begin the pace: the first text leaves at once too.
      if (position > 2) sentAt = performance.now();
      yield events;
    }
  }
}

/** As much of a batch, from `position` on, as is sent at once. */
function eventsOf(batch: LogBatch, position: number, id: string): MessageEvent[] {
  const from = position - batch.first;
  let end = from;
  for (let characters = 0; end < batch.chunks.length && characters < MOST_CHARACTERS; end++) {
    characters += batch.chunks[end]?.length ?? 0;
  }
  return batch.chunks.slice(from, end).map((data, index) => ({ id: `${id}:${position + index}`, data }));
}

/** Resolves after `ms`, or when `signal` aborts. */
export async function pause(ms: number, signal: AbortSignal): Promise<void> {
  await sleep(ms, undefined, { signal }).catch(() => undefined); // only the abort rejects, and the caller looks at it
}

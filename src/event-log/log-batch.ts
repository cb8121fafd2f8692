import { isTerminalChunk } from './chunk.js';
import type { LogBatch } from './event-log.js';

/** A batch without the chunks up to `cursor`. */
export function trim(batch: LogBatch, cursor: number): LogBatch {
  if (batch.first > cursor) return batch;
  return { ...batch, first: cursor + 1, chunks: batch.chunks.slice(cursor + 1 - batch.first) };
}

/** Two consecutive batches as one. */
export function join(head: LogBatch | undefined, tail: LogBatch): LogBatch {
  if (!head) return tail;
  return {
    first: head.first,
    last: tail.last,
    chunks: head.chunks.concat(tail.chunks),
    terminal: tail.terminal,
  };
}

/** The batch of a stored row. */
export function batchOf(row: { first_sequence: number; last_sequence: number; chunks: string }): LogBatch {
  const chunks = row.chunks.split('\n');
  return {
    first: row.first_sequence,
    last: row.last_sequence,
    chunks,
    terminal: isTerminalChunk(chunks[chunks.length - 1]),
  };
}

import type { LogBatch } from './event-log.js';

/**
 * The logs of many executions as one: chunks in one order, numbered by their positions 1, 2, 3 … without gaps. The order is
 * stored, so it is the same for every reader, in whatever process and after any crash; within an execution it is that of its
 * own log.
 */
export abstract class MergedLog {
  /**
   * Yields everything after position `after`, as {@link EventLog.read} does with sequences: what is stored, then what is
   * committed while it reads; it returns after the chunk that ends the whole, and early, without error, when `signal` aborts,
   * the log is deleted, or the process shuts down. `first` and `last` of a batch are positions.
   */
  abstract read(
    batchId: string,
    after: number,
    options: { signal: AbortSignal; idleMs?: number },
  ): AsyncGenerator<LogBatch, void, void>;

  /** Tells the readers of all processes that the batch's last chunk is in its log. */
  abstract ended(batchId: string): void;

  /** How far the order goes that is stored by now, and whether that is the last chunk of all. */
  abstract end(batchId: string): Promise<{ position: number; isFinal: boolean }>;
}

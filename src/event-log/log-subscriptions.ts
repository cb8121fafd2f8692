import { isTerminalChunk } from './chunk.js';
import type { LogBatch } from './event-log.js';

/** Characters of chunks that wait in memory for one reader; past that it is sent to the stored rows. */
const MOST_WAITING_CHARACTERS = 64 * 1024;

/** What one reader is told about its execution: committed batches while it keeps up, and how far the log goes. */
export class LogSubscription {
  private batches: LogBatch[] = [];
  private waitingCharacters = 0;
  private wake: (() => void) | undefined;
  /** Nothing more will come: the process shuts down, or the log was deleted. */
  closed = false;
  /** Highest sequence that is known to be committed. Infinity: unknown, the stored rows must be asked. */
  private known = Infinity;

  /** A batch that was committed by this process. One that does not fit is left to the stored rows. */
  deliver(batch: LogBatch, characters: number): void {
    if (this.waitingCharacters + characters <= MOST_WAITING_CHARACTERS) {
      this.batches.push(batch);
      this.waitingCharacters += characters;
    }
    this.known = Math.max(this.known, batch.last);
    this.notify();
  }

  /** Another process committed up to `last`. What is known already wakes nobody: silence must stay silence. */
  announce(last: number): void {
    if (last <= this.known) return;
    this.known = last;
    this.notify();
  }

  /** There may be stored rows that nobody announced. */
  invalidate(): void {
    this.known = Infinity;
    this.notify();
  }

  close(): void {
    this.closed = true;
    this.notify();
  }

  /** All waiting chunks right after `cursor` as one batch; undefined if the next one is not among them. */
  take(cursor: number): LogBatch | undefined {
    const waiting = this.batches;
    if (waiting.length === 0) return undefined;
    this.batches = [];
    this.waitingCharacters = 0;
    let taken: LogBatch | undefined;
    for (const batch of waiting) {
      const at = taken?.last ?? cursor;
      if (batch.last <= at) continue;
      // A gap: a batch did not fit, or another process wrote it. The stored rows have everything from here on.
      if (batch.first > at + 1) break;
      taken = join(taken, trim(batch, at));
    }
    return taken;
  }

  /** Whether the stored rows must be read to go on after `cursor`. */
  isBehind(cursor: number): boolean {
    return this.known > cursor;
  }

  /** Whether nobody has said how far the log goes: much may be waiting. */
  get isUncertain(): boolean {
    return this.known === Infinity;
  }

  /** Called before the stored rows after `cursor` are read: what is announced from here on counts as news again. */
  beginCatchUp(cursor: number): void {
    this.known = cursor;
  }

  /** Resolves true at the next news, at once if there are some; false after `idleMs` of silence; and when `signal` aborts. */
  async news(cursor: number, options: { signal: AbortSignal; idleMs: number | undefined }): Promise<boolean> {
    if (this.batches.length > 0 || this.isBehind(cursor) || this.closed || options.signal.aborted)
      return true;
    return new Promise((resolve) => {
      const settle = (heard: boolean) => {
        this.wake = undefined;
        clearTimeout(timer);
        options.signal.removeEventListener('abort', onAbort);
        resolve(heard);
      };
      const onAbort = () => settle(true);
      const timer =
        options.idleMs === undefined ? undefined : setTimeout(() => settle(false), options.idleMs);
      options.signal.addEventListener('abort', onAbort);
      this.wake = () => settle(true);
    });
  }

  private notify(): void {
    this.wake?.();
  }
}

/** Who reads what in this process. */
export class LogSubscriptions {
  private readonly byExecution = new Map<string, Set<LogSubscription>>();
  private closed = false;

  add(executionId: string): LogSubscription {
    const subscription = new LogSubscription();
    subscription.closed = this.closed;
    const subscriptions = this.byExecution.get(executionId);
    if (subscriptions) subscriptions.add(subscription);
    else this.byExecution.set(executionId, new Set([subscription]));
    return subscription;
  }

  remove(executionId: string, subscription: LogSubscription): void {
    const subscriptions = this.byExecution.get(executionId);
    subscriptions?.delete(subscription);
    if (subscriptions?.size === 0) this.byExecution.delete(executionId);
  }

  /** Hands a batch that this process has just committed to its readers. */
  deliver(executionId: string, batch: LogBatch, characters: number): void {
    this.byExecution.get(executionId)?.forEach((subscription) => subscription.deliver(batch, characters));
  }

  announce(executionId: string, last: number): void {
    this.byExecution.get(executionId)?.forEach((subscription) => subscription.announce(last));
  }

  invalidateAll(): void {
    for (const subscriptions of this.byExecution.values())
      subscriptions.forEach((subscription) => subscription.invalidate());
  }

  /** Ends the readers of an execution. */
  close(executionId: string): void {
    this.byExecution.get(executionId)?.forEach((subscription) => subscription.close());
  }

  /** Ends every reader, those to come included. */
  closeAll(): void {
    this.closed = true;
    for (const subscriptions of this.byExecution.values()) {
      subscriptions.forEach((subscription) => subscription.close());
    }
  }

  executionIds(): string[] {
    return [...this.byExecution.keys()];
  }
}

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

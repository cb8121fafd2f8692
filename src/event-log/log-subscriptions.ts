import { Injectable } from '@nestjs/common';
import type { LogBatch } from './event-log.js';
import { join, trim } from './log-batch.js';

/** Characters of chunks that wait in memory for one reader; past that it is sent to the stored rows. */
const MOST_WAITING_CHARACTERS = 64 * 1024;
/** Characters that wait for all readers together, however many there are and however slow. */
const MOST_WAITING_IN_ALL = 32 * 1024 * 1024;

/** Who is told about a log. */
export interface LogListener {
  /** A batch that was committed by this process. */
  deliver(batch: LogBatch, characters: number): void;
  /** Another process committed up to `last`. */
  announce(last: number): void;
  /** There may be stored rows that nobody announced. */
  invalidate(): void;
  /** Nothing more will come: the process shuts down, or the log was deleted. */
  close(): void;
}

/** What one reader is told about its execution: committed batches while it keeps up, and how far the log goes. */
export class LogSubscription implements LogListener {
  private batches: LogBatch[] = [];
  private waitingCharacters = 0;
  private wake: (() => void) | undefined;
  /** Nothing more will come: the process shuts down, or the log was deleted. */
  closed = false;
  /** Highest sequence that is known to be committed. Infinity: unknown, the stored rows must be asked. */
  private known = Infinity;

  /** @param inAll what waits for all readers, in characters */
  constructor(private readonly inAll: { characters: number }) {}

  /** One that does not fit is left to the stored rows. */
  deliver(batch: LogBatch, characters: number): void {
    if (
      this.waitingCharacters + characters <= MOST_WAITING_CHARACTERS &&
      this.inAll.characters + characters <= MOST_WAITING_IN_ALL
    ) {
      this.batches.push(batch);
      this.waitingCharacters += characters;
      this.inAll.characters += characters;
    }
    this.known = Math.max(this.known, batch.last);
    this.notify();
  }

  /** What is known already wakes nobody: silence must stay silence. */
  announce(last: number): void {
    if (last <= this.known) return;
    this.known = last;
    this.notify();
  }

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
    const waiting = this.discard();
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

  /** Lets go of all that waits, and returns it. */
  discard(): LogBatch[] {
    const waiting = this.batches;
    this.batches = [];
    this.inAll.characters -= this.waitingCharacters;
    this.waitingCharacters = 0;
    return waiting;
  }

  /** Whether the stored rows must be read to go on after `cursor`. */
  isBehind(cursor: number): boolean {
    return this.known > cursor;
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
@Injectable()
export class LogSubscriptions {
  private readonly byExecution = new Map<string, Set<LogListener>>();
  private readonly waiting = { characters: 0 };
  private closed = false;

  /** Tells a listener about a log, until {@link unlisten}. */
  listen(executionId: string, listener: LogListener): void {
    if (this.closed) listener.close();
    const listeners = this.byExecution.get(executionId);
    if (listeners) listeners.add(listener);
    else this.byExecution.set(executionId, new Set([listener]));
  }

  unlisten(executionId: string, listener: LogListener): void {
    const listeners = this.byExecution.get(executionId);
    listeners?.delete(listener);
    if (listeners?.size === 0) this.byExecution.delete(executionId);
  }

  add(executionId: string): LogSubscription {
    const subscription = new LogSubscription(this.waiting);
    this.listen(executionId, subscription);
    return subscription;
  }

  remove(executionId: string, subscription: LogSubscription): void {
    this.unlisten(executionId, subscription);
    subscription.discard();
  }

  /** Hands a batch that this process has just committed to its readers. */
  deliver(executionId: string, batch: LogBatch, characters: number): void {
    this.byExecution.get(executionId)?.forEach((listener) => listener.deliver(batch, characters));
  }

  announce(executionId: string, last: number): void {
    this.byExecution.get(executionId)?.forEach((listener) => listener.announce(last));
  }

  invalidateAll(): void {
    for (const listeners of this.byExecution.values()) listeners.forEach((listener) => listener.invalidate());
  }

  /** Ends the readers of an execution. */
  close(executionId: string): void {
    this.byExecution.get(executionId)?.forEach((listener) => listener.close());
  }

  /** Ends every reader, those to come included. */
  closeAll(): void {
    this.closed = true;
    for (const listeners of this.byExecution.values()) listeners.forEach((listener) => listener.close());
  }

  executionIds(): string[] {
    return [...this.byExecution.keys()];
  }
}

import { setTimeout as sleep } from 'node:timers/promises';
import { NeverWrittenError, isOutage, isSlow, isUnavailable, retryWhile } from './unavailable.js';

/** Statements aside of the others that are under way at once: each of them holds a connection. */
const MOST_ASIDE = 2;
const MOST_FAILURES = 20;
const FIRST_PAUSE_MS = 5;
/** A locked row costs others nothing to look at, a statement that meets its limit does. */
const LONGEST_PAUSE_MS = { busy: 1000, slow: 5000 };

/** Stands in a commit's results for an item whose row is locked by somebody else: it was left out, and is tried again. */
export const BUSY = Symbol('busy');

/** Repeats what fails through no fault of its own. Without it, a caller does that itself. */
export interface Patience {
  /** Ends all attempts; what was not written then fails with its reason. */
  signal: AbortSignal;
  onRetry: (error: unknown) => void;
  /** How often an item may meet its limit while others are written; 20 by default. */
  mostFailures?: number;
}

export interface WriteOptions<Item, Result> {
  /** Writes items in one statement, with one result for each in their order. `aside`: others are being written meanwhile. */
  commit: (items: Item[], aside: boolean) => Promise<(Result | typeof BUSY)[]>;
  written: (items: Item[], results: Result[]) => void;
  failed: (items: Item[], error: unknown) => void;
  /** Without `patience`: whether items that failed together with `error` are tried in smaller groups. A defect by default. */
  isolates?: (error: unknown) => boolean;
  patience?: Patience;
  /** A group failed, and its items are tried in smaller ones. */
  onSplit?: (error: unknown) => void;
}

interface Failure<Item> {
  items: Item[];
  /** `BUSY`, or what the commit threw. */
  error: unknown;
}

/**
 * Group commits in which one member never stops the others. When a group fails and the server is not away, it is tried
 * again in halves, down to the one item that can't be written, and only that one fails. What meets a time limit, or a row
 * that somebody else locked, is tried again aside, less and less often, while {@link write} goes on with others.
 */
export class IsolatedWrites<Item, Result> {
  private readonly waiting: (() => void)[] = [];
  private aside = 0;
  /** Statements that succeeded. */
  private successes = 0;

  constructor(private readonly options: WriteOptions<Item, Result>) {}

  /** Resolves when the next group may be written, which is not later than that the items of this one are settled. Never rejects. */
  async write(items: Item[]): Promise<void> {
    const failure = await this.attempt(items, false);
    if (failure) void this.settle(failure);
  }

  /** Writes items beside what {@link write} writes, as something that may take long. */
  async writeAside(items: Item[]): Promise<void> {
    const failure = await this.attemptAside(items);
    if (failure) await this.settle(failure);
  }

  /** @returns what was not written */
  private async attempt(items: Item[], aside: boolean): Promise<Failure<Item> | undefined> {
    const { commit, patience, written } = this.options;
    let results: (Result | typeof BUSY)[];
    try {
      results = await (patience
        ? retryWhile(isOutage, () => commit(items, aside), patience)
        : commit(items, aside));
    } catch (error) {
      return { items, error };
    }
    const isWritten = (result: Result | typeof BUSY): result is Result => result !== BUSY;
    const busy = items.filter((_item, index) => results[index] === BUSY);
    if (busy.length < items.length) {
      this.successes++;
      written(
        items.filter((_item, index) => results[index] !== BUSY),
        results.filter(isWritten),
      );
    }
    return busy.length === 0 ? undefined : { items: busy, error: BUSY };
  }

  private async attemptAside(items: Item[]): Promise<Failure<Item> | undefined> {
    if (this.aside >= MOST_ASIDE) await new Promise<void>((resolve) => this.waiting.push(resolve));
    else this.aside++;
    const failure = await this.attempt(items, true);
    const next = this.waiting.shift();
    if (next) next();
    else this.aside--;
    return failure;
  }

  /** Tries items that failed together until each of them is written or given up. */
  private async settle(first: Failure<Item>): Promise<void> {
    let failures = 0;
    let pause = FIRST_PAUSE_MS;
    for (let failure: Failure<Item> | undefined = first; failure;) {
      const { items, error }: Failure<Item> = failure;
      const { patience } = this.options;
      if (patience?.signal.aborted) return this.options.failed(items, patience.signal.reason);
      if (items.length > 1 && this.isToSplit(error)) return this.split(items, error);
      if (!patience || (error !== BUSY && !isUnavailable(error))) return this.options.failed(items, error);
      if (failures >= (patience.mostFailures ?? MOST_FAILURES))
        return this.options.failed(items, neverWritten(error));
      if (error !== BUSY) patience.onRetry(error);
      const { successes } = this;
      await sleep(pause, undefined, { signal: patience.signal }).catch(() => undefined); // an abort is met by the attempt
      pause = Math.min(pause * 2, LONGEST_PAUSE_MS[error === BUSY ? 'busy' : 'slow']);
      failure = await this.attemptAside(items);
      // As long as nobody gets anything in, the item is not to blame.
      if (failure && isSlow(failure.error) && this.successes > successes) failures++;
    }
  }

  private async split(items: Item[], error: unknown): Promise<void> {
    this.options.onSplit?.(error);
    const half = Math.ceil(items.length / 2);
    await Promise.all([this.writeAside(items.slice(0, half)), this.writeAside(items.slice(half))]);
  }

  private isToSplit(error: unknown): boolean {
    const { patience, isolates } = this.options;
    if (error === BUSY) return false;
    if (patience) return isSlow(error) || !isUnavailable(error);
    return isolates ? isolates(error) : !isUnavailable(error);
  }
}

function neverWritten(cause: unknown): NeverWrittenError {
  return new NeverWrittenError('It could not be written in time, however often it was tried.', { cause });
}

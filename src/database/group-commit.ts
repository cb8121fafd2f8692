import { BUSY, IsolatedWrites } from './isolated-writes.js';
import type { WriteOptions } from './isolated-writes.js';

/** UTF-8 bytes that one statement takes at most, or one item that is larger. */
export const MOST_BYTES = 4 * 1024 * 1024;

export interface GroupCommitOptions<Item> extends Pick<
  WriteOptions<Item, unknown>,
  'isolates' | 'patience' | 'onSplit'
> {
  /** How many items one statement takes at most. */
  mostItems?: number;
  /** UTF-8 bytes of an item, at least. A larger one than {@link MOST_BYTES} is committed alone, beside the groups. */
  bytesOf?: (item: Item) => number;
  /** Items with the same key are states of one thing: they are committed in their order, and of those that wait only the newest. */
  keyOf?: (item: Item) => string;
}

interface Caller<Result> {
  resolve: (result: Result) => void;
  reject: (error: unknown) => void;
}

interface Entry<Item, Result> {
  item: Item;
  bytes: number;
  key: string | undefined;
  callers: Caller<Result>[];
}

/**
 * Group commit: what arrives while a statement is in flight goes into the next one, so that a hundred transitions at
 * once cost a few commits and a single one costs no wait. An item that can't be written fails alone, and one that takes
 * long is tried beside the groups (see {@link IsolatedWrites}).
 */
export class GroupCommit<Item, Result> {
  private waiting: Entry<Item, Result>[] = [];
  private readonly waitingByKey = new Map<string, Entry<Item, Result>>();
  private inFlight = false;
  /** Keys of what is being written: what has the same one waits. */
  private readonly keys = new Set<string>();
  private readonly writes: IsolatedWrites<Entry<Item, Result>, Result>;

  /** @param commit writes the items in one statement and answers with one result for each, in their order, or `BUSY` */
  constructor(
    commit: (items: Item[]) => Promise<(Result | typeof BUSY)[]>,
    private readonly options: GroupCommitOptions<Item> = {},
  ) {
    const { isolates, patience, onSplit } = options;
    this.writes = new IsolatedWrites({
      commit: (entries) => commit(entries.map(({ item }) => item)),
      written: (entries, results) => {
        this.release(entries);
        entries.forEach(({ callers }, index) =>
          callers.forEach(({ resolve }) => resolve(results[index] as Result)),
        );
      },
      failed: (entries, error) => {
        this.release(entries);
        entries.forEach(({ callers }) => callers.forEach(({ reject }) => reject(error)));
      },
      isolates,
      patience,
      onSplit,
    });
  }

  /** Resolves with the item's own result after its commit; rejects with what `commit` threw for this item. */
  add(item: Item): Promise<Result> {
    return new Promise((resolve, reject) => {
      this.enqueue(item, { resolve, reject });
      this.begin();
    });
  }

  private enqueue(item: Item, caller: Caller<Result>): void {
    const { bytesOf, keyOf } = this.options;
    const bytes = bytesOf?.(item) ?? 0;
    const key = keyOf?.(item);
    const earlier = key === undefined ? undefined : this.waitingByKey.get(key);
    if (earlier) {
      Object.assign(earlier, { item, bytes });
      earlier.callers.push(caller);
      return;
    }
    const entry = { item, bytes, key, callers: [caller] };
    this.waiting.push(entry);
    if (key !== undefined) this.waitingByKey.set(key, entry);
  }

  private begin(): void {
    if (this.inFlight) return;
    this.inFlight = true;
    // One turn later, so that everything of this turn shares the statement.
    setImmediate(() => void this.run());
  }

  private async run(): Promise<void> {
    for (let group = this.take(); group.length > 0; group = this.take()) {
      if (group[0] && group[0].bytes > MOST_BYTES) void this.writes.writeAside(group);
      else await this.writes.write(group);
    }
    this.inFlight = false;
  }

  /** The next items that fit into one statement, in their order; one that is too large for any goes alone. */
  private take(): Entry<Item, Result>[] {
    const { mostItems = 500 } = this.options;
    const taken: Entry<Item, Result>[] = [];
    let bytes = 0;
    this.waiting = this.waiting.filter((entry) => {
      const { key } = entry;
      const fits = taken.length < mostItems && (taken.length === 0 || bytes + entry.bytes <= MOST_BYTES);
      if (!fits || (key !== undefined && this.keys.has(key))) return true;
      taken.push(entry);
      bytes += entry.bytes;
      return false;
    });
    for (const { key } of taken) {
      if (key === undefined) continue;
      this.keys.add(key);
      this.waitingByKey.delete(key);
    }
    return taken;
  }

  private release(entries: Entry<Item, Result>[]): void {
    if (!this.options.keyOf) return;
    for (const { key } of entries) if (key !== undefined) this.keys.delete(key);
    if (this.waiting.length > 0) this.begin();
  }
}

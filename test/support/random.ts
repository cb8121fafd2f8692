/**
 * Decides what happens when. `CHAOS_SEED`, which chaos-setup.mjs sets otherwise, gives the numbers of an earlier run in the
 * order in which they are asked for; the moments of its processes it can't repeat.
 */
export const SEED = Number(process.env.CHAOS_SEED);

/** Mulberry32: small, and the same numbers for the same seed. */
export class Random {
  constructor(private state = SEED) {}

  /** From 0 to below 1. */
  next(): number {
    this.state = (this.state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(this.state ^ (this.state >>> 15), 1 | this.state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  }

  /** Both ends included. */
  int(from: number, to: number): number {
    return from + Math.floor(this.next() * (to - from + 1));
  }

  pick<Item>(items: readonly Item[]): Item {
    const item = items[this.int(0, items.length - 1)];
    if (item === undefined) throw new Error('There is nothing to pick from.');
    return item;
  }
}

/**
 * Tells what has shown no change for how long, by this process's own monotonic clock: the clock of no other process has a say in
 * it. It sees no more than the looks that are made; when they were made too rarely, because this process was stopped or the
 * database away, nobody else may have been able to show a change either, so all begin afresh.
 */
export class Stillness {
  private readonly seen = new Map<string, { sign: string; since: number }>();
  private lastLook = -Infinity;

  /**
   * @param longestGapMs between two looks
   * @param now the clock, in ms
   */
  constructor(
    private readonly longestGapMs: number,
    private readonly now = () => performance.now(),
  ) {}

  /** Takes in all that there is now, with its sign, and gives back for how many ms each has shown the same one. */
  look(signs: Map<string, string>): Map<string, number> {
    const now = this.now();
    if (now - this.lastLook > this.longestGapMs) this.seen.clear();
    this.lastLook = now;
    for (const id of this.seen.keys()) if (!signs.has(id)) this.seen.delete(id);
    for (const [id, sign] of signs) {
      if (this.seen.get(id)?.sign !== sign) this.seen.set(id, { sign, since: now });
    }
    return new Map([...this.seen].map(([id, { since }]) => [id, now - since]));
  }

  /** Begins afresh: a look has failed. */
  forget(): void {
    this.seen.clear();
  }
}

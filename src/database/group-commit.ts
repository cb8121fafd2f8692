/**
 * Group commit: what arrives while a statement is in flight goes into the next one, so that a hundred transitions at
 * once cost a few commits and a single one costs no wait.
 */
export class GroupCommit<Item, Result> {
  private waiting: { item: Item; resolve: (result: Result) => void; reject: (error: unknown) => void }[] = [];
  private inFlight = false;

  /**
   * @param commit writes the items in one statement and answers with one result for each, in their order
   * @param mostItems how many items one statement takes at most
   */
  constructor(
    private readonly commit: (items: Item[]) => Promise<Result[]>,
    private readonly mostItems = 500,
  ) {}

  /** Resolves with the item's own result after its commit; rejects with what `commit` threw. */
  add(item: Item): Promise<Result> {
    return new Promise((resolve, reject) => {
      this.waiting.push({ item, resolve, reject });
      if (this.inFlight) return;
      this.inFlight = true;
      // One turn later, so that everything of this turn shares the statement.
      setImmediate(() => void this.run());
    });
  }

  private async run(): Promise<void> {
    while (this.waiting.length > 0) {
      const round = this.waiting.splice(0, this.mostItems);
      try {
        const results = await this.commit(round.map(({ item }) => item));
        round.forEach(({ resolve }, index) => resolve(results[index] as Result));
      } catch (error) {
        round.forEach(({ reject }) => reject(error));
      }
    }
    this.inFlight = false;
  }
}

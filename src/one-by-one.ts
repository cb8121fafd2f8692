/** Does pieces of asynchronous work one after the other, in the order in which they came; one that fails holds up none. */
export class OneByOne {
  private last: Promise<unknown> = Promise.resolve();

  /** Resolves and rejects as `work` does. */
  run<Result>(work: () => Promise<Result>): Promise<Result> {
    const result = this.last.then(work);
    this.last = result.catch(() => undefined); // its caller is told
    return result;
  }
}

/** Does pieces of asynchronous work one after the other, in the order in which they came; one that fails holds up none. */
export class OneByOne {
  private last: Promise<unknown> = Promise.resolve();

  /** Resolves and rejects as `work` does. */
  run<Result>(work: () => Promise<Result>): Promise<Result> {
    const result = this.last.then(work);
    // Its caller is told, and nothing keeps the result, which may be large.
    this.last = result.then(
      () => undefined,
      () => undefined,
    );
    return result;
  }
}

/**
 * A round of work that is repeated: a pause, a round, a pause, a round … Rounds never overlap, and one that fails is reported
 * and followed by the next. Timers are the global ones, which a test's clock can replace.
 */
export class Repeat {
  private timer: NodeJS.Timeout | undefined;
  private dueAt = Infinity;
  /** The pause that was asked for during a round; whoever asked has news that the round may not see. */
  private asked: number | undefined;
  private ongoing: Promise<void> | undefined;
  private readonly stopped = new AbortController();

  /**
   * @param work one round. It may answer with the pause before the next one, in ms, or with `false` to rest until
   *   {@link start}. Its signal aborts when the repetition is stopped.
   * @param options.everyMs the pause between two rounds, ms
   * @param options.onError is told why a round failed, and must not throw
   */
  constructor(
    private readonly work: (signal: AbortSignal) => Promise<number | false | void>,
    private readonly options: { everyMs: number; onError: (error: unknown) => void },
  ) {}

  /** Asks for a round `delayMs` from now, or earlier if one is due before that; during a round, for one after it. */
  start(delayMs = this.options.everyMs): void {
    if (this.stopped.signal.aborted) return;
    if (this.ongoing) {
      this.asked = Math.min(this.asked ?? Infinity, delayMs);
      return;
    }
    const dueAt = performance.now() + delayMs;
    if (dueAt >= this.dueAt) return;
    clearTimeout(this.timer);
    this.dueAt = dueAt;
    this.timer = setTimeout(() => {
      this.dueAt = Infinity;
      this.ongoing = this.run();
    }, delayMs);
  }

  /** No round begins after this, for good. Resolves when one that is under way has ended: its signal asks it to. */
  async stop(): Promise<void> {
    clearTimeout(this.timer);
    this.stopped.abort(new Error('The repetition was stopped.'));
    await this.ongoing;
  }

  private async run(): Promise<void> {
    let pause: number | false | void = undefined;
    try {
      pause = await this.work(this.stopped.signal);
    } catch (error) {
      this.options.onError(error);
    }
    this.ongoing = undefined;
    const { asked } = this;
    this.asked = undefined;
    if (asked !== undefined) this.start(asked);
    if (pause !== false) this.start(pause ?? this.options.everyMs);
  }
}

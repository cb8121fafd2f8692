/**
 * One gate for eager and paced flushes: at most one is scheduled, the earliest that anybody asked for, and none while
 * one is running.
 */
export class FlushSchedule {
  private due = Infinity;
  private timer: NodeJS.Timeout | undefined;
  private immediate: NodeJS.Immediate | undefined;
  private running = false;

  constructor(private readonly flush: () => Promise<void>) {}

  /** Asks for a flush `delayMs` from now; 0 or less means in the next turn of the event loop. */
  request(delayMs: number): void {
    const due = performance.now() + Math.max(0, delayMs);
    if (due >= this.due) return;
    this.due = due;
    if (!this.running) this.arm();
  }

  private arm(): void {
    clearTimeout(this.timer);
    if (this.immediate) return;
    const delay = this.due - performance.now();
    if (delay >= 1) this.timer = setTimeout(() => void this.run(), delay);
    else this.immediate = setImmediate(() => void this.run());
  }

  private async run(): Promise<void> {
    clearTimeout(this.timer);
    this.immediate = undefined;
    this.due = Infinity;
    this.running = true;
    await this.flush();
    this.running = false;
    if (this.due !== Infinity) this.arm();
  }
}

/** Bounds of what an execution may hold without asking, bytes. */
const SMALLEST_SHARE = 65_536;
const LARGEST_SHARE = 1_048_576;

interface Waiting {
  output: HeldOutput;
  bytes: number;
  admit: () => void;
}

/**
 * What all executions of a process hold at once: what their agents said, in bytes as `OutputLimits` counts them, and the texts and
 * prompts that are made for them, in UTF-16 code units. Below its share, an execution never waits. Beyond `most`, those above their
 * share wait for each other, and only the one that got there first goes on, so that there is always one that comes to its end. So
 * a process holds `most`, the shares, and what one execution alone may hold.
 */
export class OutputMemory {
  /** Of all executions. */
  held = 0;
  private readonly share: number;
  /** Those above their share, and those that wait, in the order in which they became so. */
  private readonly long = new Set<HeldOutput>();
  private readonly waiting = new Set<Waiting>();
  /** The first one when those that wait were looked at for the last time. */
  private lastFirst: HeldOutput | undefined;

  /** @param executions that run at once */
  constructor(
    private readonly most: number,
    private readonly executions: number,
  ) {
    this.share = Math.min(LARGEST_SHARE, Math.max(SMALLEST_SHARE, most / executions));
  }

  /** To be released when the execution is over. */
  open(): HeldOutput {
    return new HeldOutput(this);
  }

  /** Another one of the same limits, for what must not wait for these executions. */
  apart(): OutputMemory {
    return new OutputMemory(this.most, this.executions);
  }

  /** For {@link HeldOutput}, as all that follows. */
  hasRoom(output: HeldOutput, bytes: number): boolean {
    if (output.bytes + bytes <= this.share || this.held < this.most) return true;
    return this.first === undefined || this.first === output;
  }

  count(output: HeldOutput, bytes: number): void {
    const wasLong = output.bytes > this.share;
    output.bytes += bytes;
    this.held += bytes;
    if (bytes > 0 && wasLong === output.bytes > this.share) return; // of almost every piece that is said
    this.place(output);
    this.admit();
  }

  wait(output: HeldOutput, bytes: number, signal?: AbortSignal): Promise<void> {
    return new Promise((resolve, reject) => {
      const leave = () => {
        stop();
        this.admit();
        reject(signal?.reason as Error);
      };
      const stop = () => {
        signal?.removeEventListener('abort', leave);
        this.waiting.delete(waiting);
        output.waits -= 1;
        this.place(output);
      };
      const admit = () => {
        output.bytes += bytes;
        this.held += bytes;
        stop();
        resolve();
      };
      const waiting = { output, bytes, admit };
      signal?.addEventListener('abort', leave);
      this.waiting.add(waiting);
      output.waits += 1;
      this.place(output);
    });
  }

  private get first(): HeldOutput | undefined {
    return this.long.values().next().value;
  }

  private place(output: HeldOutput): void {
    if (output.waits > 0 || output.bytes > this.share) this.long.add(output);
    else this.long.delete(output);
  }

  /** Lets those go on that have room by now. Each sees what the ones before it took. */
  private admit(): void {
    if (this.waiting.size === 0 || (this.held >= this.most && this.first === this.lastFirst)) return;
    do {
      this.lastFirst = this.first;
      for (const { output, bytes, admit } of this.waiting) if (this.hasRoom(output, bytes)) admit();
    } while (this.first !== this.lastFirst);
  }
}

/** What one execution holds of an {@link OutputMemory}. */
export class HeldOutput {
  bytes = 0;
  /** How many of its agents wait. */
  waits = 0;

  constructor(private readonly memory: OutputMemory) {}

  /** Whether {@link take} would not wait. */
  hasRoom(bytes: number): boolean {
    return this.memory.hasRoom(this, bytes);
  }

  /**
   * Counts so many bytes as soon as there is room for them, in this moment if it returns nothing. Taking 0 is asking for room to go
   * on. Rejects with the reason of `signal`, and then nothing was counted.
   */
  take(bytes: number, signal?: AbortSignal): Promise<void> | undefined {
    if (!this.memory.hasRoom(this, bytes)) {
      return signal?.aborted ? Promise.reject(signal.reason as Error) : this.memory.wait(this, bytes, signal);
    }
    if (bytes > 0) this.memory.count(this, bytes);
    return undefined;
  }

  /** Counts what is held in any case. */
  add(bytes: number): void {
    this.memory.count(this, bytes);
  }

  /** Lets go of so many bytes. */
  remove(bytes: number): void {
    if (bytes > 0) this.memory.count(this, -bytes);
  }

  release(): void {
    this.remove(this.bytes);
  }
}

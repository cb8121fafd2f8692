import type { TerminalStatus } from '../executions/status.js';
import { ChunkSerializer } from './chunk.js';
import type { ChunkContent } from './chunk.js';
import { FencedError } from './event-log.js';
import type { ExecutionEnd, LogBatch, LogOwner, LogWriter } from './event-log.js';

/** Characters that may wait for the database before {@link LogWriter.drain} holds the producer. */
const HIGH_WATER_MARK = 128 * 1024;

/** Chunks of one writer that go into one row. */
export interface PendingRow {
  writer: ExecutionLogWriter;
  batch: LogBatch;
  /** The row's text: the chunks joined by LF. */
  text: string;
  /** Holds a content chunk. */
  content: boolean;
}

/** An end with its chunk, and with the one that takes its place if the execution's cancellation was requested. */
export interface WrittenEnd extends ExecutionEnd {
  sequence: number;
  chunk: string;
  cancelled_chunk: string;
  finished_at: Date;
}

/** What a writer needs of the log that it belongs to. */
export interface LogWriterHost {
  /** The writer has chunks to flush. */
  schedule(writer: ExecutionLogWriter): void;
  /** Resolves with the status that the execution ended with, and with nothing if it is not this writer's any more. */
  end(writer: ExecutionLogWriter, end: WrittenEnd): Promise<TerminalStatus | undefined>;
}

/** Numbers the chunks of one execution and collects them until the next flush. */
export class ExecutionLogWriter implements LogWriter {
  private readonly shutOff = new AbortController();
  private readonly serializer: ChunkSerializer;
  private chunks: string[] = [];
  private characters = 0;
  private hasContent = false;
  private sequence: number;
  private committedSequence: number;
  private inFlight = false;
  private drained: { promise: Promise<void>; resolve: () => void } | undefined;
  private contentAt: Date | undefined;
  /** `performance.now()` of the last flush. */
  lastFlush = -Infinity;
  /** Must not wait for the flush interval. */
  urgent = false;

  constructor(
    readonly owner: LogOwner,
    private readonly host: LogWriterHost,
  ) {
    this.serializer = new ChunkSerializer(owner);
    this.sequence = owner.last_sequence;
    this.committedSequence = owner.last_sequence;
  }

  get fenced(): AbortSignal {
    return this.shutOff.signal;
  }

  get firstContentAt(): Date | undefined {
    return this.contentAt;
  }

  append(content: ChunkContent): void {
    if (this.shutOff.signal.aborted) return;
    const line = this.serializer.serialize(content, ++this.sequence);
    this.chunks.push(line);
    this.characters += line.length;
    if (content.type === 'content') this.hasContent = true;
    if (this.chunks.length === 1 && !this.inFlight) this.host.schedule(this);
  }

  drain(): Promise<void> | undefined {
    if (this.shutOff.signal.aborted) return Promise.reject(this.shutOff.signal.reason);
    if (this.characters < HIGH_WATER_MARK) return undefined;
    return this.flushed();
  }

  async flush(): Promise<number> {
    const last = this.sequence;
    while (this.committedSequence < last) {
      this.shutOff.signal.throwIfAborted();
      this.urgent = true;
      if (!this.inFlight) this.host.schedule(this);
      await this.flushed();
    }
    this.shutOff.signal.throwIfAborted();
    return last;
  }

  async finish(end: ExecutionEnd): Promise<TerminalStatus> {
    await this.flush();
    const finished_at = new Date();
    const sequence = ++this.sequence;
    const { status, error, code } = end;
    const serialize = (content: Pick<ExecutionEnd, 'status' | 'error' | 'code'>) =>
      this.serializer.serialize({ type: 'status', ...content }, sequence, finished_at.getTime());
    const chunk = serialize({ status, error, code });
    const cancelled_chunk = serialize({ status: 'cancelled' });
    const ended = await this.host.end(this, { ...end, sequence, chunk, cancelled_chunk, finished_at });
    if (ended) return ended;
    this.shutOut();
    throw this.shutOff.signal.reason;
  }

  /** Everything that waits, as one row; it counts as in flight until {@link committed} or {@link shutOut}. */
  takeRow(): PendingRow | undefined {
    if (this.chunks.length === 0) return undefined;
    const { chunks, hasContent } = this;
    this.chunks = [];
    this.characters = 0;
    this.hasContent = false;
    this.inFlight = true;
    this.urgent = false;
    const batch = { first: this.sequence - chunks.length + 1, last: this.sequence, chunks, terminal: false };
    return { writer: this, batch, text: chunks.join('\n'), content: hasContent };
  }

  committed(row: PendingRow): void {
    if (row.content) this.contentAt ??= new Date();
    this.committedSequence = row.batch.last;
    this.settle();
    if (this.chunks.length > 0) this.host.schedule(this);
  }

  /** Nothing of this writer goes into the log any more: a newer attempt owns the execution, or writing failed for good. */
  shutOut(reason: unknown = this.fencedError()): void {
    this.shutOff.abort(reason);
    this.chunks = [];
    this.characters = 0;
    this.settle();
  }

  private fencedError(): FencedError {
    return new FencedError(`The execution ${this.owner.execution_id} is not this attempt's any more.`);
  }

  private settle(): void {
    this.inFlight = false;
    this.drained?.resolve();
    this.drained = undefined;
  }

  /** Resolves after the flush that is in flight or scheduled. */
  private async flushed(): Promise<void> {
    if (!this.drained) {
      let resolve = () => {};
      const promise = new Promise<void>((settle) => (resolve = settle));
      this.drained = { promise, resolve };
    }
    await this.drained.promise;
    this.shutOff.signal.throwIfAborted();
  }
}

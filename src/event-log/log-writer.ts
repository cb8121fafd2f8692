import { storableText } from '../database/storable-text.js';
import type { TerminalStatus } from '../executions/status.js';
import { cutText } from '../json-text.js';
import { MOST_LINE_BYTES } from '../line-limit.js';
import { ChunkSerializer } from './chunk.js';
import type { ChunkContent } from './chunk.js';
import { SHORT_TEXT } from './chunk-lines.js';
import { FencedError } from './event-log.js';
import type { ExecutionEnd, LogBatch, LogOwner, LogWriter, TextContent } from './event-log.js';

/** Characters that may wait for the database before {@link LogWriter.drain} holds the producer. */
const HIGH_WATER_MARK = 128 * 1024;
/** Characters of one row: three bytes of UTF-8 each at most, so it stays below 1 MiB, and a reader takes one at least. */
const MOST_ROW_CHARACTERS = 256 * 1024;
/** The one with the most digits. */
const MOST_SEQUENCE = 2_147_483_647;

/** A message may repeat what a workflow's author or a client wrote; so much of it fits into a chunk, whatever it is. */
function cutError(message: string): string {
  return cutText(message, MOST_LINE_BYTES / 2)[0] ?? '';
}

/** Chunks of one writer that go into one row. */
export interface PendingRow {
  writer: ExecutionLogWriter;
  batch: LogBatch;
  /** Of all chunks. */
  characters: number;
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
  private sequence: number;
  private takenSequence: number;
  private committedSequence: number;
  private inFlight = false;
  private drained: { promise: Promise<void>; resolve: () => void } | undefined;
  private firstContent: number | undefined;
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
    this.takenSequence = owner.last_sequence;
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
    const { data } = content;
    if (typeof data !== 'string' || data.length <= SHORT_TEXT) return this.push(content);
    const rest = Buffer.byteLength(this.serializer.serialize({ ...content, data: '' }, MOST_SEQUENCE));
    for (const piece of cutText(data, MOST_LINE_BYTES - rest)) this.push({ ...content, data: piece });
  }

  write(content: TextContent): Promise<void> | undefined {
    this.append(content);
    return this.drain();
  }

  drain(): Promise<void> | undefined {
    if (this.shutOff.signal.aborted) return Promise.reject(this.shutOff.signal.reason);
    if (this.characters < HIGH_WATER_MARK) return undefined;
    // A producer that is held makes no small rows, and what it waits for need not keep the pace.
    this.urgent = true;
    if (!this.inFlight) this.host.schedule(this);
    return this.hasRoom();
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
    const { status, code } = end;
    const error = end.error === undefined ? undefined : cutError(storableText(end.error));
    const serialize = (content: Pick<ExecutionEnd, 'status' | 'error' | 'code'>) =>
      this.serializer.serialize({ type: 'status', ...content }, sequence, finished_at.getTime());
    const chunk = serialize({ status, error, code });
    const cancelled_chunk = serialize({ status: 'cancelled' });
    const ended = await this.host.end(this, { ...end, error, sequence, chunk, cancelled_chunk, finished_at });
    if (ended) return ended;
    this.shutOut();
    throw this.shutOff.signal.reason;
  }

  /**
   * What waits as one row, at least one chunk and more as long as there is room for them; the rest is for a later flush. It counts as
   * in flight until {@link committed} or {@link shutOut}.
   */
  takeRow(room: number): PendingRow | undefined {
    if (this.chunks.length === 0) return undefined;
    const { chunks, characters } = this.takeChunks(Math.min(room, MOST_ROW_CHARACTERS));
    const first = this.takenSequence + 1;
    this.takenSequence += chunks.length;
    this.characters -= characters;
    this.inFlight = true;
    this.urgent = false;
    const batch = { first, last: this.takenSequence, chunks, terminal: false };
    return { writer: this, batch, characters };
  }

  committed({ batch }: PendingRow): void {
    if (this.firstContent !== undefined && this.firstContent <= batch.last) this.contentAt ??= new Date();
    this.committedSequence = batch.last;
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

  private push(content: ChunkContent): void {
    const line = this.serializer.serialize(content, ++this.sequence);
    this.chunks.push(line);
    this.characters += line.length;
    if (content.type === 'content') this.firstContent ??= this.sequence;
    if (this.chunks.length === 1 && !this.inFlight) this.host.schedule(this);
  }

  private takeChunks(most: number): { chunks: string[]; characters: number } {
    const { chunks, characters } = this;
    if (characters <= most) {
      this.chunks = [];
      return { chunks, characters };
    }
    let taken = chunks[0]?.length ?? 0;
    let count = 1;
    for (let next = chunks[1]?.length; next !== undefined && taken + next <= most;) {
      taken += next;
      next = chunks[++count]?.length;
    }
    return { chunks: chunks.splice(0, count), characters: taken };
  }

  private async hasRoom(): Promise<void> {
    while (this.characters >= HIGH_WATER_MARK) await this.flushed();
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

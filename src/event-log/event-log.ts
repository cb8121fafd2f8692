import type { TerminalStatus } from '../executions/status.js';
import type { ChunkContent, ChunkOrigin } from './chunk.js';

/** Consecutive chunks of one execution, already committed. */
export interface LogBatch {
  /** Sequence of `chunks[0]`. */
  first: number;
  last: number;
  /** Serialized {@link Chunk}s, one line of JSON each. */
  chunks: string[];
  /** The last chunk of this batch is the execution's terminal one. */
  terminal: boolean;
}

/** What an agent said: an answer, or a text on the way to it. */
export type TextContent = ChunkContent & { type: 'content' | 'progress'; data: string };

/** What makes a worker the owner of an execution's log. */
export interface LogOwner extends ChunkOrigin {
  execution_id: string;
  /** The fencing token that its claim was given: a newer one shuts it out. */
  fence: number;
  /** Highest sequence that is in the log already. */
  last_sequence: number;
}

/** The end of an execution, committed together with its terminal chunk and the deployment's counters. */
export interface ExecutionEnd {
  status: TerminalStatus;
  error?: string;
  code?: string;
  /** What the answering agents said, also when the run failed or was cancelled on the way. */
  response: string;
  input_tokens: number;
  output_tokens: number;
  /** When the first content chunk was committed; absent if there was none. */
  first_chunk_at?: Date;
}

/** The owner's pen. Nothing that it writes is seen by a reader before it is committed. */
export interface LogWriter {
  /** Aborts once nothing can be written any more: with {@link FencedError} if a newer attempt owns the execution, else with what failed. */
  readonly fenced: AbortSignal;
  /** When the first `content` chunk was committed. */
  readonly firstContentAt: Date | undefined;
  /**
   * Numbers a chunk and queues it for the next flush; wait for {@link drain} before writing without bound. A text that is too long for
   * one line of a stream is cut, on code points, into several chunks.
   */
  append(content: ChunkContent): void;
  /** Appends a text, a long one little by little. Wait for the promise, if there is one, as for {@link drain}'s. */
  write(content: TextContent): Promise<void> | undefined;
  /** Resolves when little enough is waiting for the database; rejects as {@link fenced} says. */
  drain(): Promise<void> | undefined;
  /**
   * Resolves when everything appended so far is committed, with the sequence of the last of it; it does not wait for the
   * flush interval. Rejects as {@link fenced} says.
   */
  flush(): Promise<number>;
  /**
   * Flushes, then writes the terminal chunk and the execution's end in one transaction. Resolves with the status that it
   * ended with: `cancelled`, whatever `end` says, if that was requested before. Rejects as {@link fenced} says.
   */
  finish(end: ExecutionEnd): Promise<TerminalStatus>;
}

/** A newer attempt owns the execution; whatever this one still wants to write is void. */
export class FencedError extends Error {
  override name = 'FencedError';
}

/**
 * The log is the truth, and every stream is a view of it: readers are handed a chunk only after its commit, so whoever
 * knows an execution's id and a sequence can go on reading there, in any process and after any crash.
 */
export abstract class EventLog {
  /** Takes over the log of an execution; the caller has just made `owner.fence` the execution's. */
  abstract open(owner: LogOwner): LogWriter;

  /** Yields what the log of an execution holds now, in pieces, from its first chunk. Rejects as pg does. */
  abstract stored(executionId: string): AsyncGenerator<LogBatch, void, void>;

  /**
   * Yields everything after sequence `after`, first what is stored, then what is committed while it reads, and returns
   * after the terminal chunk. It reads on only when asked for the next batch, so a slow reader holds one batch at most.
   * `idleMs` bounds the silence: an empty batch is yielded each time nothing came for that long.
   * Returns early, without error, when `signal` aborts, the log is deleted, or the process shuts down. There is nothing to
   * wait for after the terminal chunk, so `after` must be less than its sequence. Reading at `after` = 100,000 costs the
   * same as at 10.
   */
  abstract read(
    executionId: string,
    after: number,
    options: { signal: AbortSignal; idleMs?: number },
  ): AsyncGenerator<LogBatch, void, void>;
}

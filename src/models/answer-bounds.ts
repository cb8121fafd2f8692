import { OutputLimitError } from '../errors.js';

/** Of an answer that says nothing but that the call failed, which is known by its status, so much is read. */
const MOST_ERROR_BYTES = 256 * 1024;

const LF = 10;
const CR = 13;

/** What of a body may be read. */
export interface AnswerBound {
  /**
   * Counts a piece before it is read on. Throws {@link OutputLimitError} if the body is larger than it may be.
   *
   * @returns whether the rest of the body is left out
   */
  count(piece: Uint8Array): boolean;
}

/**
 * Bounds what is kept of a provider's answer while it is read: the whole body, and of an event stream, which is passed on
 * as it comes, each single event.
 */
export function boundOf({ status, type }: { status: number; type: string }, mostBytes: number): AnswerBound {
  if (status < 200 || status >= 300) return new CutBody(MOST_ERROR_BYTES);
  return type.startsWith('text/event-stream') ? new EventStream(mostBytes) : new WholeBody(mostBytes);
}

class CutBody implements AnswerBound {
  private bytes = 0;

  constructor(private readonly most: number) {}

  count(piece: Uint8Array): boolean {
    this.bytes += piece.byteLength;
    return this.bytes > this.most;
  }
}

class WholeBody implements AnswerBound {
  private bytes = 0;

  constructor(private readonly most: number) {}

  count(piece: Uint8Array): boolean {
    this.bytes += piece.byteLength;
    if (this.bytes > this.most) throw tooLarge(this.most, 'answer');
    return false;
  }
}

class EventStream implements AnswerBound {
  /** Since the last empty line, which ends an event. */
  private bytes = 0;
  private endsLine = false;

  constructor(private readonly most: number) {}

  count(piece: Uint8Array): boolean {
    const buffer = Buffer.from(piece.buffer, piece.byteOffset, piece.byteLength);
    const end = Math.max(buffer.lastIndexOf('\n\n'), buffer.lastIndexOf('\n\r\n'));
    const beginsWithEmptyLine = this.endsLine && (buffer[0] === LF || buffer[0] === CR);
    if (end >= 0) this.bytes = buffer.length - end;
    else this.bytes = (beginsWithEmptyLine ? 0 : this.bytes) + buffer.length;
    if (buffer.length > 0) this.endsLine = buffer[buffer.length - 1] === LF;
    if (this.bytes > this.most) throw tooLarge(this.most, 'event of the answer');
    return false;
  }
}

function tooLarge(most: number, what: string): OutputLimitError {
  return new OutputLimitError('provider', `An ${what} of the model provider is larger than ${most} bytes.`);
}

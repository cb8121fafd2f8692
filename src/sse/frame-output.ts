import { once } from 'node:events';
import type { OutgoingHttpHeaders } from 'node:http';
import type { Response } from 'express';

/**
 * In place of Nest's: without a charset some clients decode Latin-1 (`text/*` of old), and its `Cache-Control` says more
 * than the API promises.
 */
const HEADERS = {
  'Content-Type': 'text/event-stream; charset=utf-8',
  'Cache-Control': 'no-cache, no-transform',
};

type WriteHead = (status: number, headers: OutgoingHttpHeaders) => Response;
type Write = (text: string) => boolean;

/**
 * The response under a stream that `@Sse` writes: it gets the promised headers, no empty line before the first frame
 * (which some clients take for an event), and the frames of a batch in one write, as each write costs more than its frame.
 */
export class FrameOutput {
  private awaited = 0;
  private gathered = '';
  private isFirst = true;
  private arrived: () => void = () => {};

  constructor(private readonly response: Response) {
    const writeHead = response.writeHead.bind(response) as WriteHead;
    const write = response.write.bind(response) as Write;
    const head: WriteHead = (status, headers) => writeHead(status, { ...headers, ...HEADERS });
    response.writeHead = head as Response['writeHead'];
    response.write = ((text: string) => this.take(text, write)) as Response['write'];
  }

  /** The next `count` frames that arrive are one batch. Call it before they are handed to `@Sse`. */
  gather(count: number): void {
    this.awaited = count;
    this.gathered = '';
  }

  /**
   * Resolves once the batch was written and the client's socket has room again, or when `signal` aborts. `@Sse` can't
   * pause a producer and would queue for a slow client without end, so the log is read on only after this.
   */
  async drained(signal: AbortSignal): Promise<void> {
    if (this.awaited > 0 && !signal.aborted) {
      await new Promise<void>((resolve) => {
        this.arrived = () => {
          signal.removeEventListener('abort', this.arrived);
          resolve();
        };
        signal.addEventListener('abort', this.arrived);
      });
    }
    if (!this.response.writableNeedDrain || signal.aborted) return;
    await once(this.response, 'drain', { signal }).catch(() => undefined); // an abort or a broken socket: the caller's signal tells
  }

  private take(text: string, write: Write): boolean {
    if (this.isFirst) {
      this.isFirst = false;
      if (text === '\n') return true;
    }
    // A comment that Nest writes to find out whether a client is still there is none of the batch's frames.
    if (this.awaited === 0 || (text.startsWith(':') && this.awaited > 1)) return write(text);
    this.gathered += idLast(text);
    if (--this.awaited > 0) return true;
    const hasRoom = write(this.gathered);
    this.gathered = '';
    this.arrived();
    return hasRoom;
  }
}

/**
 * A frame with its id behind its data. Some clients take an event for received as soon as they have its `id` line
 * (fetch-event-source does), and would lose the event if the connection broke in its data.
 */
function idLast(frame: string): string {
  const idLength = frame.indexOf('\n') + 1;
  return `${frame.slice(idLength, -1)}${frame.slice(0, idLength)}\n`;
}

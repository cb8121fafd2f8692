import { request } from 'node:http';
import type { ClientRequest } from 'node:http';
import { EventStream } from './studio.js';
import type { Frame } from './studio.js';

/** One request on a connection of its own, which the client may drop at any moment. */
export class RawClient {
  private readonly request: ClientRequest;
  /** The execution that the answer's head names. */
  executionId = '';
  /** The answer has ended, or the connection has. */
  isOver = false;
  private text = '';
  private wake: () => void = () => undefined;

  constructor(url: string, body?: object) {
    const method = body ? 'POST' : 'GET';
    this.request = request(url, { method, agent: false, headers: { 'Content-Type': 'application/json' } });
    this.request.on('error', () => undefined); // a dropped connection is what this client is for
    this.request.on('close', () => {
      this.isOver = true;
      this.wake();
    });
    this.request.on('response', (answer) => {
      this.executionId = answer.headers['content-location']?.split('/').at(-1) ?? '';
      answer.on('error', () => undefined); // the same, in the middle of the answer
      answer.setEncoding('utf8').on('data', (text: string) => {
        this.text += text;
        this.wake();
      });
    });
    this.request.end(body && JSON.stringify(body));
  }

  /** Bytes that came over the wire. */
  get bytesRead(): number {
    return this.request.socket?.bytesRead ?? 0;
  }

  /** Frames that came so far. */
  get frames(): number {
    return this.text.split('\n\n').length - 1;
  }

  /** Resolves when this many frames have come, or when the answer is over. */
  async read(frames: number): Promise<void> {
    while (this.frames < frames && !this.isOver) await new Promise<void>((resolve) => (this.wake = resolve));
  }

  /** The frames up to the end of the answer. */
  async whole(): Promise<Frame[]> {
    await this.read(Infinity);
    return new EventStream(new Response(this.text)).frames();
  }

  /** Reads nothing more, so that the buffers on the way fill up. */
  stall(): void {
    this.request.socket?.pause();
  }

  /** Drops the connection at once and without a farewell (RST). */
  reset(): void {
    this.request.socket?.resetAndDestroy();
  }

  /** Closes the connection in good order (FIN). */
  close(): void {
    this.request.destroy();
  }
}

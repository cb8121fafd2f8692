import { get } from 'node:http';
import type { IncomingMessage } from 'node:http';
import { connect } from 'node:net';
import type { Socket } from 'node:net';
import { Duplex } from 'node:stream';
import { EventStream } from './studio.js';

/** How a slow client reads: so many bytes, then nothing for so long. */
export interface Pace {
  bytes: number;
  pauseMs: number;
}

export const ONE_KIB_A_SECOND: Pace = { bytes: 1024, pauseMs: 1000 };

/**
 * A connection that is read at a pace. Between two reads nothing is taken from the kernel, so that its buffers fill up
 * and the server meets a full socket. Node can't make these buffers smaller; they hold some MB at most, which a test's
 * stream must exceed.
 */
export class PacedConnection extends Duplex {
  /** Bytes read so far. */
  received = 0;
  private readonly socket: Socket;
  private pauseMs: number;
  private timer: NodeJS.Timeout | undefined;

  constructor(url: URL, { bytes, pauseMs }: Pace) {
    super();
    this.pauseMs = pauseMs;
    const buffer = Buffer.alloc(bytes);
    // Reading into a buffer of its own is the only way to take less than the 64 KiB that Node takes at once.
    const callback = (length: number) => this.accept(Buffer.from(buffer.subarray(0, length)));
    this.socket = connect({ host: url.hostname, port: Number(url.port), onread: { buffer, callback } });
    this.socket.on('end', () => this.push(null));
    this.socket.on('error', (error) => this.destroy(error));
  }

  /** From now on everything is read as it comes. */
  hurry(): void {
    clearTimeout(this.timer);
    this.pauseMs = 0;
    this.socket.resume();
  }

  override _read(): void {} // the pace decides, not the demand

  override _write(data: Buffer, encoding: BufferEncoding, done: (error?: Error | null) => void): void {
    this.socket.write(data, encoding, done);
  }

  override _destroy(error: Error | null, done: (error: Error | null) => void): void {
    clearTimeout(this.timer);
    this.socket.destroy();
    done(error);
  }

  /** Answers whether to read on at once. */
  private accept(piece: Buffer): boolean {
    this.received += piece.length;
    this.push(piece);
    if (this.pauseMs === 0) return true;
    this.timer = setTimeout(() => this.socket.resume(), this.pauseMs);
    return false;
  }
}

/** A client that reads one event stream more slowly than it is written. */
export class SlowReader {
  private constructor(
    private readonly connection: PacedConnection,
    readonly stream: EventStream,
  ) {}

  /** Resolves when the head of the answer has come. */
  static async open(url: string, pace = ONE_KIB_A_SECOND): Promise<SlowReader> {
    const target = new URL(url);
    const connection = new PacedConnection(target, pace);
    const request = get(target, { createConnection: () => connection });
    const answer = await new Promise<IncomingMessage>((resolve, reject) => {
      request.on('response', resolve).on('error', reject);
    });
    return new SlowReader(connection, new EventStream(new Response(answer)));
  }

  /** Bytes taken off the wire so far. */
  get received(): number {
    return this.connection.received;
  }

  hurry(): void {
    this.connection.hurry();
  }

  leave(): void {
    this.connection.destroy();
  }
}

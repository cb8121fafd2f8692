import { once } from 'node:events';
import type { Socket } from 'node:net';
import { WebSocket } from 'ws';
import type { ClientOptions } from 'ws';
import type { Chunk } from '../../src/event-log/chunk.js';
import type { Frame } from './studio.js';

/** A message of the server. */
export interface Answer {
  event: string;
  id?: string | number;
  after?: number;
  data: Record<string, unknown>;
  /** The text as it came. */
  raw: string;
}

/** One stream as it came over a WebSocket. */
export interface WsStream {
  executionId: string;
  frames: Frame[];
  /** Whether `end` came. */
  ended: boolean;
}

/** A client of `/api/ws`. */
export class WsClient {
  /** All that came, in its order. */
  readonly answers: Answer[] = [];
  closed: { code: number; reason: string } | undefined;
  pongs = 0;
  private readonly waiting = new Set<() => void>();
  private ids = 0;

  private constructor(readonly webSocket: WebSocket) {
    webSocket.on('message', (data: Buffer) => {
      const raw = data.toString('utf8');
      this.answers.push({ ...(JSON.parse(raw) as Omit<Answer, 'raw'>), raw });
      this.wake();
    });
    webSocket.on('pong', () => {
      this.pongs++;
      this.wake();
    });
    webSocket.on('close', (code, reason) => {
      this.closed = { code, reason: reason.toString() };
      this.wake();
    });
    webSocket.on('error', () => undefined); // `closed` says it
  }

  /** Begins to connect. */
  static begin(server: string, options: ClientOptions = {}): WsClient {
    return new WsClient(new WebSocket(`${server.replace(/^http/, 'ws')}/api/ws`, options));
  }

  static async open(server: string, options: ClientOptions = {}): Promise<WsClient> {
    const client = WsClient.begin(server, options);
    await once(client.webSocket, 'open');
    return client;
  }

  /** The connection below. */
  get socket(): Socket {
    return (this.webSocket as unknown as { _socket: Socket })._socket;
  }

  /** Sends a message under a new id. @returns the id */
  send(event: string, data?: object): string {
    const id = `m${++this.ids}`;
    this.webSocket.send(JSON.stringify({ event, id, data }));
    return id;
  }

  /** Sends a text as it is. */
  sendText(text: string): void {
    this.webSocket.send(text);
  }

  /** The first answer of all that passes; fails if the connection is closed before. */
  async answer(passes: (answer: Answer) => boolean): Promise<Answer> {
    for (let index = 0; ;) {
      for (; index < this.answers.length; index++) {
        const answer = this.answers[index];
        if (answer && passes(answer)) return answer;
      }
      if (this.closed) throw new Error(`The WebSocket was closed with ${JSON.stringify(this.closed)}.`);
      await this.news();
    }
  }

  /** Sends a message and resolves with the first answer to it. */
  async ask(event: string, data?: object): Promise<Answer> {
    const id = this.send(event, data);
    return this.answer((answer) => answer.id === id);
  }

  /** Resolves when the condition holds after some news. */
  async until(condition: () => boolean): Promise<void> {
    while (!condition()) {
      if (this.closed) throw new Error(`The WebSocket was closed with ${JSON.stringify(this.closed)}.`);
      await this.news();
    }
  }

  /** Executes, and resolves with the execution's id. */
  async execute(data: object): Promise<{ id: string; executionId: string }> {
    const id = this.send('execute', data);
    const accepted = await this.answer((answer) => answer.id === id);
    if (accepted.event !== 'accepted') throw new Error(accepted.raw);
    return { id, executionId: String(accepted.data['execution_id']) };
  }

  /** The frames so far of the stream that a message began. */
  frames(id: string): Frame[] {
    return this.answers.filter((answer) => answer.id === id && answer.event === 'chunk').map(frameOf);
  }

  /** The frames up to the end of the stream that a message began. */
  async whole(id: string): Promise<Frame[]> {
    await this.answer((answer) => answer.id === id && (answer.event === 'end' || answer.event === 'error'));
    return this.frames(id);
  }

  async close(): Promise<void> {
    this.webSocket.close();
    await this.over();
  }

  /** Resolves when the connection is closed. */
  async over(): Promise<{ code: number; reason: string }> {
    while (!this.closed) await this.news();
    return this.closed;
  }

  /** Drops the connection without a farewell (RST). */
  reset(): void {
    this.socket.resetAndDestroy();
  }

  private news(): Promise<void> {
    return new Promise((resolve) => this.waiting.add(resolve));
  }

  private wake(): void {
    const waiting = [...this.waiting];
    this.waiting.clear();
    for (const resolve of waiting) resolve();
  }
}

/** A chunk as an SSE client has it: with the id of its event, and its text to the byte. */
export function frameOf({ raw, after, data }: Answer): Frame {
  const chunk = data as unknown as Chunk;
  return { id: `${chunk.execution_id}:${after}`, data: raw.slice(raw.indexOf('"data":') + 7, -1), chunk };
}

import { Logger } from '@nestjs/common';
import type { Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import type { WebSocket } from 'ws';
import { AppError } from '../errors.js';
import type { JsonLimits } from '../json-body.js';
import type { Metrics } from '../metrics.js';
import { logFailure, problemOf, translate } from '../problem.filter.js';
import { parseMessage } from './message.js';
import { SocketOutput } from './socket-output.js';
import { Subscription } from './subscription.js';
import type { OpenedSource } from './stream-sources.js';
import { WEBSOCKET_PATH } from './websocket.dto.js';
import type { AnswerEvent, ClientMessage, MessageId, StreamTargetDto } from './websocket.dto.js';

/** Messages of one client that are worked on at once; further ones wait in its socket. */
const MOST_AT_ONCE = 32;

/** How long the answers to messages that are at work are waited for at the end, and how often that is looked at, ms. */
const LONGEST_ANSWER_MS = 1000;
const LOOK_MS = 10;

/** Does what a message asks for. Never rejects: what is wrong is told to the client. */
export type MessageHandler = (message: ClientMessage) => Promise<void>;

export interface ConnectionOptions {
  webSocket: WebSocket;
  socket: Socket;
  /** Names the connection in the log and in problems. */
  requestId: string;
  limits: { mostSubscriptions: number; json: JsonLimits };
  metrics: Metrics;
}

/** A stream to be sent, and what to call when it is not sent any more. */
export interface Follow extends OpenedSource {
  /** The message that began it. */
  id: MessageId | undefined;
  leave?: () => void;
}

interface Followed {
  name: StreamTargetDto;
  subscription: Subscription;
  leave: () => void;
}

/** One client: its messages, a few at a time, and the streams that it follows. */
export class ClientConnection {
  readonly requestId: string;
  readonly output: SocketOutput;
  private readonly logger = new Logger('WebSocket');
  private readonly followed = new Map<string, Followed>();
  /** Places of streams that are being looked for. */
  private reserved = 0;
  private readonly unread: string[] = [];
  private atWork = 0;
  /** The latest message about each stream: the next one waits for it. */
  private readonly latest = new Map<string, Promise<void>>();
  private handler: MessageHandler | undefined;
  private closed = false;

  constructor(private readonly options: ConnectionOptions) {
    this.requestId = options.requestId;
    this.output = new SocketOutput(options.webSocket, options.socket, () => this.work());
  }

  get subscriptions(): number {
    return this.followed.size;
  }

  /** From here on messages are handled. */
  listen(handler: MessageHandler): void {
    this.handler = handler;
    this.work();
  }

  /** A text that the client sent. */
  receive(text: string): void {
    if (this.closed) return;
    this.unread.push(text);
    this.work();
  }

  answer(id: MessageId | undefined, event: AnswerEvent, data: object): void {
    this.output.answer(JSON.stringify({ event, id, data }));
  }

  /** Tells the client what is wrong, and the log if it is the server's fault. */
  fail(thrown: unknown, id: MessageId | undefined): void {
    const error = translate(thrown);
    logFailure(this.logger, error, { request_id: this.requestId });
    const retry_after = error.retryAfter === undefined ? undefined : Math.ceil(error.retryAfter);
    this.answer(id, 'error', {
      ...problemOf(error, { id: this.requestId, path: WEBSOCKET_PATH }),
      retry_after,
    });
  }

  /**
   * Keeps a place for a stream that is being looked for; the function that it returns gives it back. Throws
   * `too_many_subscriptions`.
   */
  reserve(): () => void {
    const { mostSubscriptions } = this.options.limits;
    if (this.followed.size + this.reserved >= mostSubscriptions) {
      throw new AppError(
        'too_many_subscriptions',
        `This WebSocket follows ${mostSubscriptions} streams already. End one with "unsubscribe", or open another WebSocket.`,
      );
    }
    this.reserved++;
    return () => void this.reserved--;
  }

  /** Throws `already_subscribed`. */
  refuseSecond(name: StreamTargetDto): void {
    if (!this.followed.has(keyOf(name))) return;
    throw new AppError(
      'already_subscribed',
      'This WebSocket follows that stream already. Its frames have the id of the message that began it; end it with "unsubscribe" first to begin it anew.',
    );
  }

  /** Sends a stream from here on. Throws `already_subscribed`. */
  follow({ id, source, after, ended, leave = () => undefined }: Follow): void {
    if (this.closed) return leave();
    try {
      this.refuseSecond(source.name);
    } catch (error) {
      leave();
      throw error;
    }
    const { metrics } = this.options;
    const { output } = this;
    const key = keyOf(source.name);
    const onEnd = () => this.unfollow(key);
    const subscription = new Subscription({ source, id, after, output, onEnd });
    this.followed.set(key, { name: source.name, subscription, leave });
    metrics.webSocketSubscriptions.inc();
    if (ended) return subscription.end();
    subscription.run().catch((error: unknown) => {
      if (this.followed.get(key)?.subscription !== subscription) return; // nobody is there to be told
      this.unfollow(key);
      this.fail(error, id);
    });
  }

  /** Sends nothing more of the streams that are followed and have this name, or more of a name. */
  unsubscribe(target: StreamTargetDto): void {
    for (const [key, { name }] of this.followed) if (isNamed(name, target)) this.drop(key);
  }

  /** Ends the connection in good order, with a code of RFC 6455, section 7.4; what it follows is not read any more. */
  close(code: number, reason: string): void {
    this.leave();
    this.options.webSocket.close(code, reason);
    if (this.options.webSocket.isPaused) this.options.webSocket.resume(); // to read the other side's answer
  }

  /** Reads no further message, and closes once those at work are answered, or after a moment. */
  async drain(code: number, reason: string): Promise<void> {
    this.handler = undefined;
    const giveUp = performance.now() + LONGEST_ANSWER_MS;
    while (this.atWork > 0 && !this.closed && performance.now() < giveUp) await sleep(LOOK_MS);
    if (!this.closed) this.close(code, reason);
  }

  /** The client has gone, or is not to get anything more: frees all that it held. */
  leave(): void {
    if (this.closed) return;
    this.closed = true;
    this.unread.length = 0;
    for (const key of this.followed.keys()) this.drop(key);
    this.output.close();
  }

  private drop(key: string): void {
    this.followed.get(key)?.subscription.cancel();
    this.unfollow(key);
  }

  private unfollow(key: string): void {
    const followed = this.followed.get(key);
    if (!followed) return;
    this.followed.delete(key);
    this.options.metrics.webSocketSubscriptions.dec();
    followed.leave();
  }

  /** Takes up messages as long as not too much is under way, and reads the socket accordingly. */
  private work(): void {
    const { webSocket } = this.options;
    if (!this.handler || this.closed) return;
    while (this.atWork < MOST_AT_ONCE && !this.output.isFull) {
      const text = this.unread.shift();
      if (text === undefined) {
        if (webSocket.isPaused) webSocket.resume();
        return;
      }
      this.handle(text, this.handler);
      if (this.closed) return;
    }
    if (!webSocket.isPaused) webSocket.pause();
  }

  private handle(text: string, handler: MessageHandler): void {
    const parsed = parseMessage(text, this.options.limits.json);
    if (parsed.kind === 'no json') return this.close(1007, 'A message must be JSON text.');
    if (parsed.kind === 'refused') return this.fail(parsed.error, parsed.id);
    this.atWork++;
    void this.inOrder(parsed.stream, () => handler(parsed.message)).finally(() => {
      this.atWork--;
      this.work();
    });
  }

  /** Messages about the same stream are handled one after the other, so that the last word counts. */
  private async inOrder(stream: string | undefined, work: () => Promise<void>): Promise<void> {
    if (stream === undefined) return work();
    const turn = (this.latest.get(stream) ?? Promise.resolve()).then(work);
    this.latest.set(stream, turn);
    try {
      await turn;
    } finally {
      if (this.latest.get(stream) === turn) this.latest.delete(stream);
    }
  }
}

function keyOf({ execution_id, batch_id, deployment_name, environment }: StreamTargetDto): string {
  return JSON.stringify([execution_id, batch_id, deployment_name, environment]);
}

function isNamed(name: StreamTargetDto, target: StreamTargetDto): boolean {
  const { environment = name.environment } = target;
  return keyOf({ ...target, environment }) === keyOf(name);
}

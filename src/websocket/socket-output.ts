import type { Socket } from 'node:net';
import type { WebSocket } from 'ws';

/** How long a socket may be full before those who wait for it let go of what they hold, ms. */
const PATIENCE_MS = 100;
/** Characters that those who wait may hold together; more is left where it was read. */
const MOST_HELD = 256 * 1024;
/** Answers that wait for a full socket; beyond that, or so many characters, no further request is read. */
const MOST_ANSWERS = 16;
const MOST_ANSWER_CHARACTERS = 64 * 1024;

/** Gives the turn back; every turn ends with a call of it. */
export type EndTurn = () => void;

/** Who waits for a turn. `held` is what it has in hand meanwhile, in characters; undefined: nothing but its place. */
interface Waiting {
  held: number | undefined;
  settle: (turn: EndTurn | undefined) => void;
}

/**
 * What goes out over one WebSocket: answers first, then one piece of each stream in turn. Nothing is queued for a client
 * that does not read. A stream waits for its turn, and when the socket stays full it does so with empty hands, since what
 * it has to send can be read again.
 */
export class SocketOutput {
  private readonly answers: string[] = [];
  private answerCharacters = 0;
  private readonly waiting: Waiting[] = [];
  private held = 0;
  private isTaken = false;
  private isStuck = false;
  private patience: NodeJS.Timeout | undefined;
  private pong: Buffer | undefined;
  private closed = false;

  /** `onRoom` is called whenever a full socket has taken what waited for it. */
  constructor(
    private readonly webSocket: WebSocket,
    private readonly socket: Socket,
    private readonly onRoom: () => void,
  ) {
    socket.on('drain', this.drained);
  }

  /** The client has not taken what was written. */
  get isBlocked(): boolean {
    return this.socket.writableNeedDrain;
  }

  /** So many answers wait that no further request should be read. */
  get isFull(): boolean {
    return this.answers.length >= MOST_ANSWERS || this.answerCharacters >= MOST_ANSWER_CHARACTERS;
  }

  /** Sends an answer to a request, before anything that waits for a turn. */
  answer(frame: string): void {
    if (this.closed) return;
    if (this.answers.length === 0 && !this.isBlocked) return this.webSocket.send(frame);
    this.answers.push(frame);
    this.answerCharacters += frame.length;
  }

  /** Answers a ping. While the socket is full only the newest is kept, which answers the others, too (RFC 6455, section 5.5.3). */
  answerPing(payload: Buffer): void {
    if (this.closed) return;
    if (this.isBlocked) this.pong = payload;
    else this.webSocket.pong(payload);
  }

  /**
   * Resolves when it is the caller's turn to {@link send}. Turns are given in the order in which they were asked for, while
   * the socket has room. With `held`, the characters that the caller has in hand, it resolves undefined where the caller must
   * put them down: too much is held already, or the socket stays full. Ask again without them. Undefined, too, once `signal`
   * aborted or the socket closed.
   */
  turn(signal: AbortSignal, held?: number): Promise<EndTurn | undefined> {
    if (signal.aborted || this.closed) return Promise.resolve(undefined);
    const mustWait = this.isTaken || this.isBlocked || this.waiting.length > 0;
    if (held !== undefined && mustWait && (this.isStuck || this.held + held > MOST_HELD)) {
      return Promise.resolve(undefined);
    }
    return new Promise((resolve) => {
      const settle = (turn: EndTurn | undefined) => {
        signal.removeEventListener('abort', onAbort);
        this.held -= held ?? 0;
        resolve(turn);
      };
      const waiting = { held, settle };
      const onAbort = () => {
        this.waiting.splice(this.waiting.indexOf(waiting), 1);
        settle(undefined);
      };
      signal.addEventListener('abort', onAbort);
      this.held += held ?? 0;
      this.waiting.push(waiting);
      this.giveTurn();
    });
  }

  /** Sends the frames of a piece in one write. Only for whoever has the turn. */
  send(frames: string[]): void {
    if (this.closed) return;
    this.socket.cork();
    for (const frame of frames) this.webSocket.send(frame);
    this.socket.uncork();
  }

  /** Nothing is sent from here on, and nobody waits any more. */
  close(): void {
    this.closed = true;
    this.socket.off('drain', this.drained);
    clearTimeout(this.patience);
    this.answers.length = 0;
    for (const { settle } of this.waiting.splice(0)) settle(undefined);
  }

  private giveTurn(): void {
    const isOpen = this.webSocket.readyState === this.webSocket.OPEN;
    if (this.isTaken || this.closed || !isOpen || this.waiting.length === 0) return;
    if (this.isBlocked) {
      this.patience ??= setTimeout(this.lostPatience, PATIENCE_MS);
      return;
    }
    const next = this.waiting.shift();
    if (!next) return;
    this.isTaken = true;
    let isOver = false;
    next.settle(() => {
      if (isOver) return;
      isOver = true;
      this.isTaken = false;
      this.giveTurn();
    });
  }

  private readonly drained = (): void => {
    clearTimeout(this.patience);
    this.patience = undefined;
    this.isStuck = false;
    if (this.pong) this.webSocket.pong(this.pong);
    this.pong = undefined;
    while (this.answers.length > 0 && !this.isBlocked) {
      const frame = this.answers.shift() ?? '';
      this.answerCharacters -= frame.length;
      this.webSocket.send(frame);
    }
    this.giveTurn();
    this.onRoom();
  };

  private readonly lostPatience = (): void => {
    this.patience = undefined;
    this.isStuck = true;
    const patient = this.waiting.filter(({ held }) => held === undefined);
    const impatient = this.waiting.filter(({ held }) => held !== undefined);
    this.waiting.splice(0, Infinity, ...patient);
    for (const { settle } of impatient) settle(undefined);
  };
}

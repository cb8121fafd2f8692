import type { LogBatch } from '../event-log/event-log.js';
import { MOST_CHARACTERS, pause } from '../executions/chunk-events.js';
import type { EndTurn, SocketOutput } from './socket-output.js';
import type { StreamTargetDto } from './websocket.dto.js';

/** How long a stream that reads again what it put down may keep the others waiting, ms: a crash of PostgreSQL may have taken it. */
const LONGEST_TURN_MS = 1000;
/** Before a stream that broke off is read again, ms. */
const BROKEN_OFF_MS = 1000;

/** Consecutive items of a stream, each a line of JSON. Their positions count up from `first` where `positions` does not give them. */
export type StreamBatch = Pick<LogBatch, 'first' | 'chunks' | 'terminal'> & { positions?: number[] };

/** What can be followed from any position, as often as one likes. */
export interface StreamSource {
  /** The event of its frames. */
  readonly event: 'chunk' | 'status';
  /** Which stream it is, as answers and its last frame say. */
  readonly name: StreamTargetDto;
  /** Least time between two pieces, ms. */
  readonly intervalMs: number;
  /**
   * Yields what comes after a position; without one from its beginning. It reads on only when asked for more. An empty
   * batch is yielded each time nothing came for `idleMs`. Returns after the last item, and early when `signal` aborts, the
   * stream was deleted, or the process shuts down.
   */
  read(
    after: number | undefined,
    options: { signal: AbortSignal; idleMs?: number },
  ): AsyncGenerator<StreamBatch, void, void>;
  /** Why {@link read} returned early: resolves true if nothing comes after this position, rejects with what is wrong, and when `signal` aborts. */
  isOver(after: number | undefined, signal: AbortSignal): Promise<boolean>;
}

/** What a stream needs to know to be sent. */
export interface SubscriptionOptions {
  source: StreamSource;
  /** `id` of the message that began it. */
  id: string | number | undefined;
  /** Position of the last item that the client has. */
  after: number | undefined;
  output: SocketOutput;
  /** Called before the last frame is sent. */
  onEnd: () => void;
}

/** Sends one stream to a client. It keeps nothing but its position while it waits for a socket that stays full. */
export class Subscription {
  private readonly stop = new AbortController();
  private readonly frameHead: string;
  private position: number | undefined;
  private sentAt = -Infinity;

  constructor(private readonly options: SubscriptionOptions) {
    const { id, source, after } = options;
    const echoed = id === undefined ? '' : `"id":${JSON.stringify(id)},`;
    this.frameHead = `{"event":"${source.event}",${echoed}"after":`;
    this.position = after;
  }

  /** Nothing is sent after this. */
  cancel(): void {
    this.stop.abort();
  }

  /** Sends the stream to its end, or until {@link cancel}. Rejects with what is wrong with it. */
  async run(): Promise<void> {
    const { source, output } = this.options;
    const { signal } = this.stop;
    let turn: EndTurn | undefined;
    for (;;) {
      const outcome = await this.read(turn);
      turn = undefined;
      if (outcome === 'ended' || signal.aborted) return;
      if (outcome === 'parked') {
        await this.pace();
        turn = await output.turn(signal);
      } else if (outcome === 'broken off') {
        if (await source.isOver(this.position, signal)) return this.end();
        await pause(BROKEN_OFF_MS, signal);
      }
    }
  }

  /** Says that nothing is left. */
  end(): void {
    if (this.stop.signal.aborted) return;
    this.options.onEnd();
    this.options.output.answer(this.endFrame());
  }

  /** Reads and sends until the end, or until the socket stays full. What it then has in hand is read again later. */
  private async read(turn: EndTurn | undefined): Promise<'ended' | 'parked' | 'quiet' | 'broken off'> {
    const { source, output } = this.options;
    const { signal } = this.stop;
    let endTurn = turn;
    try {
      const idleMs = turn && LONGEST_TURN_MS;
      for await (const batch of source.read(this.position, { signal, idleMs })) {
        for (let index = 0; index < batch.chunks.length;) {
          if (!endTurn) {
            await this.pace();
            endTurn = await output.turn(signal, charactersOf(batch));
            if (!endTurn) return 'parked';
          }
          if (signal.aborted) return 'broken off';
          index = this.send(batch, index);
          endTurn();
          endTurn = undefined;
        }
        if (batch.terminal) return 'ended';
        // Nothing came in its turn: it waits without one.
        if (batch.chunks.length === 0 && turn) return 'quiet';
      }
      return 'broken off';
    } finally {
      endTurn?.();
    }
  }

  /** As much of a batch, from `from` on, as one turn allows. @returns where the next turn goes on */
  private send(batch: StreamBatch, from: number): number {
    const frames: string[] = [];
    let index = from;
    for (let characters = 0; index < batch.chunks.length && characters < MOST_CHARACTERS; index++) {
      const item = batch.chunks[index] ?? '';
      characters += item.length;
      this.position = batch.positions?.[index] ?? batch.first + index;
      frames.push(`${this.frameHead}${this.position},"data":${item}}`);
    }
    if (batch.terminal && index === batch.chunks.length) {
      this.options.onEnd();
      frames.push(this.endFrame());
    }
    this.options.output.send(frames);
    // `started` alone does not begin the pace: the first text leaves at once, too.
    if ((this.position ?? 0) > 1) this.sentAt = performance.now();
    return index;
  }

  private endFrame(): string {
    return JSON.stringify({ event: 'end', id: this.options.id, data: this.options.source.name });
  }

  private async pace(): Promise<void> {
    const early = this.sentAt + this.options.source.intervalMs - performance.now();
    if (early >= 1) await pause(early, this.stop.signal);
  }
}

function charactersOf({ chunks }: StreamBatch): number {
  return chunks.reduce((sum, chunk) => sum + chunk.length, 0);
}

import { setTimeout as sleep } from 'node:timers/promises';
import { BatchRoutes } from './batches.js';
import { isConnectionFailure } from './chaos-clients.js';
import type { ClientOptions } from './chaos-clients.js';
import { Studio, isTerminal } from './studio.js';
import type { EventStream, Frame } from './studio.js';

/** Before it connects again. */
const PAUSE_MS = 50;
/** A connection on which nothing comes for so long, not even a heartbeat, is given up. */
const SILENCE_MS = 4000;

/**
 * A client of a batch's merged stream that never gives up: at another process each time, by GET or by the repeated POST, until
 * the batch has ended.
 */
export class BatchClient {
  batchId = '';
  readonly frames: Frame[] = [];
  readonly faults: string[] = [];
  /** Streams that were answered with 200. */
  connections = 0;
  private url: string;
  private readonly giveUpAt: number;

  /**
   * @param body the batch; `key` starts it once, whoever of its clients comes first
   * @param cuts after so many events each it leaves by itself, and comes back
   */
  constructor(
    private readonly body: object,
    private readonly key: string,
    private readonly options: ClientOptions,
    private readonly cuts: number[] = [],
  ) {
    this.url = options.random.pick(options.urls);
    this.giveUpAt = Date.now() + options.patienceMs;
  }

  /** Resolves with all that was received once the batch has ended. */
  async follow(): Promise<Frame[]> {
    let isOver = false;
    while (!isOver) {
      if (Date.now() > this.giveUpAt)
        throw new Error(`The client of batch ${this.batchId} gave up after ${this.frames.at(-1)?.data}.`);
      try {
        isOver = await this.attempt();
      } catch (error) {
        if (!isConnectionFailure(error)) throw error;
      }
      const others = this.options.urls.filter((url) => url !== this.url);
      this.url = this.options.random.pick(others.length > 0 ? others : this.options.urls);
      if (!isOver) await sleep(PAUSE_MS);
    }
    return this.frames;
  }

  private async attempt(): Promise<boolean> {
    const hungUp = new AbortController();
    const stream = await this.connect(hungUp.signal);
    if (stream.status === 200) return this.read(stream, hungUp);
    const text = await stream.response.text();
    if (stream.status !== 503 && stream.status !== 502)
      throw new Error(`Batch ${this.batchId} was refused with ${stream.status}: ${text}`);
    return false;
  }

  private connect(signal: AbortSignal): Promise<EventStream> {
    const routes = new BatchRoutes(new Studio(this.url));
    const last = this.frames.at(-1);
    const headers = { 'Idempotency-Key': this.key };
    if (!last) return routes.stream(this.body, { headers, signal });
    const lastEventId = { 'Last-Event-ID': last.id };
    return this.options.random.int(0, 1) === 0
      ? routes.stream(this.body, { headers: { ...headers, ...lastEventId }, signal })
      : routes.follow(this.batchId, undefined, { headers: lastEventId, signal });
  }

  private async read(stream: EventStream, hungUp: AbortController): Promise<boolean> {
    this.connections++;
    this.batchId = stream.executionId || this.batchId;
    const cut = this.cuts.shift() ?? Infinity;
    let seen = -1;
    const watch = setInterval(() => {
      if (stream.raw.length === seen) hungUp.abort();
      seen = stream.raw.length;
    }, SILENCE_MS);
    try {
      let count = 0;
      for await (const frame of stream) {
        const due = `${this.batchId}:${this.frames.length + 1}`;
        if (frame.id !== due) this.faults.push(`${frame.id} came where ${due} was due`);
        this.frames.push(frame);
        if (isTerminal(frame) && frame.chunk.item_id === undefined) return true;
        if (++count === cut) return false;
      }
      return false;
    } finally {
      clearInterval(watch);
    }
  }
}

import { setTimeout as sleep } from 'node:timers/promises';
import { Studio, isTerminal } from './studio.js';
import type { EventStream, Frame } from './studio.js';
import type { Random } from './random.js';

/** A connection on which nothing comes for so long, not even a heartbeat, is given up. */
const SILENCE_MS = 4000;
/** Before it connects again. */
const PAUSE_MS = 50;

/** What became of a request, told by whoever sent it. */
export interface ClientRun {
  marker: string;
  executionId: string;
  /** All that was received, over all connections; empty for those who did not stream. */
  frames: Frame[];
  /** Streams that were answered with 200. */
  connections: number;
  /** Connections that ended in good order, and without a terminal chunk. */
  cleanCloses: number;
  /** Statuses other than 2xx. */
  refusals: number[];
  /** How often the position was refused as lost, and everything was read anew (docs/streaming.md). */
  rereads: number;
  faults: string[];
}

export interface ChaosRequest {
  deployment_name: string;
  query: string;
}

/** Where a client may ask, and how it chooses. */
export interface ClientOptions {
  urls: string[];
  random: Random;
  /** When it gives up, in ms from now: only ends a test that hangs. */
  patienceMs: number;
}

/** A client that never gives up: the same request again until it is accepted, the stream again at another process until its end. */
export class ChaosClient {
  readonly run: ClientRun;
  private url: string;
  private readonly giveUpAt: number;

  constructor(
    private readonly request: ChaosRequest,
    private readonly options: ClientOptions,
  ) {
    this.url = options.random.pick(options.urls);
    this.giveUpAt = Date.now() + options.patienceMs;
    const counts = { connections: 0, cleanCloses: 0, rereads: 0 };
    this.run = { marker: request.query, executionId: '', frames: [], ...counts, refusals: [], faults: [] };
  }

  /** Starts an execution and does not follow it. Resolves when it was acknowledged. */
  async accept(): Promise<ClientRun> {
    while (this.run.executionId === '') {
      await this.attempt(async () => {
        const { status, body } = await new Studio(this.url).json<{ execution_id: string }>(
          '/api/workflows/execute/async',
          { method: 'POST', body: this.request, headers: this.key },
        );
        if (status === 202) this.run.executionId = body.execution_id;
        else this.run.refusals.push(status);
      });
    }
    return this.run;
  }

  /** Starts an execution and reads its stream to the terminal chunk, over as many connections as that takes. */
  stream(): Promise<ClientRun> {
    const run = this.follow();
    run.catch(() => undefined); // a test that has failed meanwhile does not wait for it
    return run;
  }

  private async follow(): Promise<ClientRun> {
    let isOver = false;
    while (!isOver) {
      await this.attempt(async () => {
        const hungUp = new AbortController();
        const stream = await this.connect(hungUp.signal);
        if (stream.status === 200) isOver = await this.read(stream, hungUp);
        else await this.refused(stream);
      });
    }
    return this.run;
  }

  /** The same key with each repetition: a request whose answer was lost must not run twice. */
  private get key() {
    return { 'Idempotency-Key': this.request.query };
  }

  private connect(signal: AbortSignal): Promise<EventStream> {
    const studio = new Studio(this.url);
    const { executionId, frames } = this.run;
    if (executionId === '') return studio.stream(this.request, { headers: this.key, signal });
    return studio.follow(executionId, frames.at(-1)?.chunk.sequence, { signal });
  }

  private async read(stream: EventStream, hungUp: AbortController): Promise<boolean> {
    const { run } = this;
    run.connections++;
    run.executionId = stream.executionId || run.executionId;
    const stopWatching = watch(stream, hungUp);
    try {
      for await (const frame of stream) {
        const expected = run.frames.length + 1;
        if (frame.chunk.sequence !== expected)
          run.faults.push(`chunk ${frame.chunk.sequence} came where ${expected} was due`);
        run.frames.push(frame);
        if (isTerminal(frame)) return true;
      }
      run.cleanCloses++;
      return false;
    } finally {
      stopWatching();
    }
  }

  private async refused(stream: EventStream): Promise<void> {
    const { status, response } = stream;
    const text = await response.text();
    this.run.refusals.push(status);
    if (status === 503 || status === 502) return;
    if (status === 400 && this.run.frames.length > 0 && text.includes('invalid_cursor')) {
      this.run.frames = [];
      this.run.rereads++;
      return;
    }
    this.run.faults.push(`was refused with ${status}: ${text.slice(0, 300)}`);
  }

  /** A failed connection is what this client is for: it goes to another process. */
  private async attempt(work: () => Promise<void>): Promise<void> {
    const { urls, random } = this.options;
    if (Date.now() > this.giveUpAt) {
      const { executionId, frames, refusals } = this.run;
      const last = frames.at(-1)?.data ?? 'nothing';
      throw new Error(
        `The client of ${this.request.query} gave up on execution ${executionId || '(none)'} after ${last}; refusals: ${refusals}`,
      );
    }
    try {
      await work();
    } catch (error) {
      if (!isConnectionFailure(error)) throw error;
    }
    const others = urls.filter((url) => url !== this.url);
    this.url = random.pick(others.length > 0 ? others : urls);
    await sleep(PAUSE_MS);
  }
}

/** As `fetch` tells that there is nobody, or not any more. By the name: its classes are not those of Jest's realm. */
export function isConnectionFailure(error: unknown): boolean {
  const { name, message } = error as Error;
  return name === 'AbortError' || (name === 'TypeError' && /^(fetch failed|terminated)$/.test(message));
}

function watch(stream: EventStream, hungUp: AbortController): () => void {
  let seen = -1;
  const timer = setInterval(() => {
    if (stream.raw.length === seen) hungUp.abort();
    seen = stream.raw.length;
  }, SILENCE_MS);
  return () => clearInterval(timer);
}

// The load generator: keeps a number of streams open at once, reads and checks them all.
import { createConnection } from 'node:net';
import { answer } from './child.mjs';
import './askers.mjs';
import './followers.mjs';
import { BatchCheck, StreamCheck } from './stream-check.mjs';
import { clockUs } from './streams.mjs';

/** A stream on which nothing came for this long counts as failed, ms. */
const SILENCE_MS = 15_000;

/**
 * One client with one connection, which asks for a stream, reads it to its end, and asks for the next one as long as
 * the run's time is not over.
 */
class Client {
  /** Streams that it asked for so far. */
  begun = 0;

  /** @param wait ms until it asks for its first stream */
  constructor(run, wait) {
    this.run = run;
    this.ended = new Promise((resolve) => (this.end = resolve));
    if (wait === 0) this.next();
    else setTimeout(() => this.next(), wait);
  }

  next() {
    const { run } = this;
    if (run.isOver(this.begun)) {
      this.socket?.destroy();
      this.end();
      return;
    }
    this.begun++;
    const Check = run.expected?.items === undefined ? StreamCheck : BatchCheck;
    this.check = new Check({ ...run.expected, onText: run.onText });
    this.firstContentSeen = false;
    this.connect();
    this.asked = this.heard = performance.now();
    this.socket.write(run.request);
  }

  connect() {
    if (this.socket && !this.socket.destroyed) return;
    const socket = createConnection({ port: this.run.port, host: '127.0.0.1', noDelay: true });
    this.socket = socket;
    socket.on('data', (piece) => this.receive(piece));
    let why = 'closed by the server';
    socket.on('error', (error) => (why = error.code));
    socket.on('close', () => {
      if (this.socket !== socket || this.check === undefined) return;
      this.check.close(why);
      this.settle();
    });
  }

  receive(piece) {
    const { check, run } = this;
    const { frames: before, restarts, speaking } = check;
    this.heard = performance.now();
    if (run.isStamped) run.heardAt = clockUs();
    check.read(piece.latin1Slice());
    if (check.restarts > restarts) run.restartedAt.push(clockUs());
    if (before === 0 && check.frames > 0) run.firstChunk.push(this.heard - this.asked);
    for (let count = speaking; count < check.speaking; count++) run.spokeAt.push(this.heard - run.begun);
    if (!this.firstContentSeen && check.content > 0) {
      this.firstContentSeen = true;
      run.firstContent.push(this.heard - this.asked);
      run.allLiveFrom = clockUs();
    }
    if (check.over || check.fault !== undefined) this.settle();
  }

  checkSilence(now) {
    if (now - this.heard < SILENCE_MS) return;
    this.check.fault ??= `nothing came for ${SILENCE_MS / 1000} s, after ${this.check.frames} chunks`;
    this.settle();
  }

  settle() {
    const { check, run } = this;
    if (check === undefined) return;
    this.check = undefined;
    run.finished++;
    run.allLiveUntil ??= clockUs();
    run.chunks += check.content;
    if (check.fault !== undefined) run.fail(check.fault);
    if (check.closes || check.fault !== undefined) {
      const { socket } = this;
      this.socket = undefined;
      socket.destroy();
    }
    this.next();
  }
}

// Between two runs nothing else keeps this process alive.
process.channel.ref();

/**
 * Keeps `streams` streams of the server on `port` open for `seconds`, or until every client has read `each` of them, then
 * lets the last ones end.
 * @param options.ramp ms over which the clients begin, one after the other
 * @param options.expected what the streams are to be, see {@link StreamCheck}; with `items`, see {@link BatchCheck}
 * @param options.isStamped each text is the moment at which the upstream wrote it
 * @returns counts of finished streams and content chunks, ms from the first request to the last stream's end, ms to the
 *   first chunk and to the first content of each stream, and the faults with their counts; `spokeAt`: ms from the first
 *   request to the first content of each execution, in the order of their coming; `latencies`: µs from the
 *   upstream to here of each stamped chunk that was written while all streams were live; `restartedAt`: of each
 *   chunk that said so, see clockUs
 */
answer(
  'load',
  async ({ port, path, body, streams, seconds = Infinity, each = Infinity, ramp = 0, ...check }) => {
    const begun = performance.now();
    const faults = {};
    /** In turn when a chunk was written, and when it came here. */
    const moments = [];
    const run = {
      port,
      request: Buffer.from(
        `POST ${path} HTTP/1.1\r\nHost: 127.0.0.1:${port}\r\nAccept: text/event-stream\r\n` +
          `Content-Type: application/json\r\nContent-Length: ${Buffer.byteLength(body)}\r\n\r\n${body}`,
      ),
      begun,
      finished: 0,
      chunks: 0,
      firstChunk: [],
      firstContent: [],
      spokeAt: [],
      restartedAt: [],
      failed: false,
      fail: (fault) => {
        faults[fault] = (faults[fault] ?? 0) + 1;
        run.failed = true;
      },
      isOver: (count) => run.failed || count >= each || performance.now() - begun >= seconds * 1000,
      expected: check.expected,
      isStamped: check.isStamped,
      onText: check.isStamped ? (text) => moments.push(Number(text), run.heardAt) : undefined,
    };
    const clients = Array.from({ length: streams }, (_, index) => new Client(run, (index * ramp) / streams));
    const watch = setInterval(() => {
      const now = performance.now();
      for (const client of clients) if (client.check) client.checkSilence(now);
    }, 1000);
    await Promise.all(clients.map((client) => client.ended));
    clearInterval(watch);
    const ms = performance.now() - begun;
    const latencies = [];
    for (let index = 0; index < moments.length; index += 2) {
      const [written, heard] = moments.slice(index, index + 2);
      if (written >= run.allLiveFrom && written < run.allLiveUntil) latencies.push(heard - written);
    }
    const { finished, chunks, firstChunk, firstContent, spokeAt, restartedAt } = run;
    return { finished, chunks, ms, firstChunk, firstContent, spokeAt, restartedAt, latencies, faults };
  },
);
process.send({ ready: true });

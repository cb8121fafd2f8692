// Clients of the load generator that follow executions, each on a connection of its own.
import { createConnection } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { answer } from './child.mjs';
import { StreamCheck } from './stream-check.mjs';

/** A stream that somebody waits for, and on which nothing came for this long, counts as failed, ms. */
const SILENCE_MS = 15_000;
/** So many connections are opened at once: a backlog that overflows would cost a second. */
const OPENED_AT_ONCE = 100;
/** What the server still does for the stream that was just closed shall not delay the next one, ms. */
const PAUSE_MS = 5;

/** Streams that are held open from one question to the next. */
const held = [];

/** One `GET /api/executions/:id/stream`. */
class Follower {
  bytes = 0;
  isClosed = false;
  why = 'closed by the server';

  /**
   * @param options.tokens chunks of content in the whole stream
   * @param options.after sequence of the last chunk that the client has
   * @param options.from chunk with which its speed begins to count
   * @param options.until it leaves after so many chunks
   * @param options.stalls it stops reading once its first chunk has come
   */
  constructor({ port, executionId, tokens, after = 0, from = 2, until = Infinity, stalls = false }) {
    this.check = new StreamCheck({ tokens, after });
    this.from = from;
    this.until = until;
    this.stalls = stalls;
    /** Both resolve when there is a fault, too. */
    this.opened = new Promise((resolve) => (this.open = resolve));
    this.ended = new Promise((resolve) => (this.end = resolve));
    this.asked = performance.now();
    this.socket = createConnection({ port, host: '127.0.0.1', noDelay: true });
    this.socket.setTimeout(SILENCE_MS, () => {
      this.check.fault ??= `nothing came for ${SILENCE_MS / 1000} s, after ${this.check.frames} chunks`;
      this.close();
    });
    this.socket.on('data', (piece) => this.receive(piece));
    this.socket.on('error', (error) => (this.why = error.code));
    this.socket.on('close', () => {
      if (!this.isClosed) this.check.close(this.why);
      this.open();
      this.end();
    });
    const lastEventId = after === 0 ? '' : `Last-Event-ID: ${executionId}:${after}\r\n`;
    this.socket.write(
      `GET /api/executions/${executionId}/stream HTTP/1.1\r\nHost: 127.0.0.1:${port}\r\n` +
        `Accept: text/event-stream\r\n${lastEventId}\r\n`,
    );
  }

  receive(piece) {
    const now = performance.now();
    const { check } = this;
    this.bytes += piece.length;
    check.read(piece.latin1Slice());
    if (this.firstFrameMs === undefined && check.frames > 0) {
      this.firstFrameMs = now - this.asked;
      if (this.stalls) this.socket.pause();
      this.open();
    }
    if (check.frames >= this.from) this.begun ??= { at: now, bytes: this.bytes };
    this.heardAt = now;
    if (check.over || check.fault !== undefined || check.frames >= this.until) this.close();
  }

  /** Nobody waits for what comes next. */
  hold() {
    this.socket.setTimeout(0);
  }

  /** Reads so many more chunks after all. */
  readOn(chunks) {
    this.until = this.check.frames + chunks;
    this.socket.setTimeout(SILENCE_MS);
    this.socket.resume();
  }

  close() {
    this.isClosed = true;
    this.socket.destroy();
  }
}

const faultsOf = (followers) =>
  followers.map(({ check }) => check.fault).filter((fault) => fault !== undefined);

/**
 * ms from connecting to the first whole frame, `samples` times for each of the `cursors` in turn.
 * @returns `{times: {[cursor]: number[]}, faults}`
 */
answer('firstFrames', async ({ cursors, samples, ...stream }) => {
  const times = Object.fromEntries(cursors.map((cursor) => [cursor, []]));
  const faults = [];
  for (let sample = 0; sample < samples && faults.length === 0; sample++) {
    // To and fro, so that no cursor always comes after the same one.
    for (const after of sample % 2 === 0 ? cursors : cursors.toReversed()) {
      const follower = new Follower({ ...stream, after, until: 1 });
      await follower.ended;
      faults.push(...faultsOf([follower]));
      if (follower.firstFrameMs !== undefined) times[after].push(follower.firstFrameMs);
      await sleep(PAUSE_MS);
    }
  }
  return { times, faults };
});

/**
 * Reads a stream as fast as it comes.
 * @returns its faults, and the bytes and ms from its chunk `from` on
 */
answer('follow', async (stream) => {
  const follower = new Follower(stream);
  await follower.ended;
  const { bytes, heardAt, begun = { at: heardAt, bytes } } = follower;
  return { bytes: bytes - begun.bytes, ms: heardAt - begun.at, faults: faultsOf([follower]) };
});

/** Opens `count` streams of these executions in turn, and holds them; `faults` of those that did not open. */
answer('hold', async ({ count, executionIds, ...stream }) => {
  for (let index = 0; index < count;) {
    const next = Math.min(count, index + OPENED_AT_ONCE);
    const followers = [];
    for (; index < next; index++) {
      const executionId = executionIds[index % executionIds.length];
      followers.push(new Follower({ ...stream, executionId }));
    }
    held.push(...followers);
    await Promise.all(followers.map(({ opened }) => opened));
    followers.forEach((follower) => follower.hold());
    if (faultsOf(followers).length > 0) break;
  }
  return { faults: faultsOf(held) };
});

/** Lets one of the held streams that stalled read so many more chunks; it is closed then. */
answer('readOn', async ({ chunks }) => {
  const follower = held.pop();
  follower.readOn(chunks);
  await follower.ended;
  return { faults: faultsOf([follower]) };
});

/** Closes all held streams; `faults` of those that ended before, or were not what they should be. */
answer('release', async () => {
  const followers = held.splice(0);
  const faults = faultsOf(followers);
  followers.forEach((follower) => follower.close());
  await Promise.all(followers.map(({ ended }) => ended));
  return { faults };
});

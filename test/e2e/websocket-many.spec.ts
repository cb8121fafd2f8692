import { randomUUID } from 'node:crypto';
import { EventEmitter, once } from 'node:events';
import type { ServerResponse } from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { beforeAll, describe, expect, it } from '@jest/globals';
import fc from 'fast-check';
import { itInFull, rounds } from '../support/effort.js';
import { Answer } from '../support/execution-plans.js';
import { expectByChance } from '../support/inconclusive.js';
import { echo, faultsOfStream, textOf, upstreamAgent } from '../support/studio.js';
import type { Frame } from '../support/studio.js';
import { chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import { withStudio } from '../support/with-studio.js';
import { WsClient } from '../support/ws-client.js';

const RUNS = rounds(20, 5);
/** Ends what hangs, so that fast-check gets to say how it can be repeated. */
const LONGEST_SEARCH_MS = 300_000;

/** By the query that is asked. */
const answers = new Map<string, Answer>();
const server = withStudio({
  upstream: (response, { query }) =>
    query.startsWith('gated') ? speakGated(response) : answers.get(query)?.give(response),
  others: { other: { ROLE: 'api' } },
  leavesNothing: true,
});
const { studio } = server;
const { other } = server.others;
let spoken: string;
let echoed: string;

beforeAll(async () => {
  spoken = await studio.deploy(upstreamAgent());
  echoed = await studio.deploy(echo());
});

const linesOf = (frames: Frame[]) => frames.map(({ id, data }) => `${id} ${data}`);
const whole = async (executionId: string) => (await studio.follow(executionId)).frames();

/** Makes the upstream say these words to a new query. @returns the query */
function speech(words: string[], pauseMs = 0): string {
  const query = randomUUID();
  answers.set(
    query,
    new Answer(
      words.map((text) => ({ text, length: text.length, pause: pauseMs })),
      true,
    ),
  );
  return query;
}

it('100 executions at once on one socket, each with its own marker: no chunk goes to another one', async () => {
  const client = await WsClient.open(server.url);
  const markers = Array.from({ length: 100 }, () => randomUUID());
  const ids = markers.map((query) => client.send('execute', { deployment_name: echoed, query }));
  const streams = await Promise.all(ids.map((id) => client.whole(id)));
  streams.forEach((frames, index) => {
    const executionId = frames[0]?.chunk.execution_id ?? '';
    expect(faultsOfStream(frames, executionId)).toEqual([]);
    const named = markers.filter((marker) => textOf(frames).includes(marker));
    expect(named).toEqual([markers[index]]);
  });
  await client.close();
});

const gate = new EventEmitter().setMaxListeners(0);
const WORDS = Array.from({ length: 40 }, (_, index) => `word ${index} `);

/** Says one word, and the others once the gate is open. */
async function speakGated(response: ServerResponse): Promise<void> {
  const [first = '', ...others] = WORDS.map(chatDelta);
  writeStream(response, first);
  await once(gate, 'open');
  writeStream(response, ...others, chatEnd());
  response.end();
}

it('many executions on one socket speak at the same time, and all are whole', async () => {
  const client = await WsClient.open(server.url);
  const ids = Array.from({ length: rounds(100, 30) }, (_, index) =>
    client.send('execute', { deployment_name: spoken, query: `gated ${index}` }),
  );
  const begun = () =>
    new Set(client.answers.flatMap(({ id, data }) => (data['type'] === 'content' ? [id] : []))).size;
  await client.until(() => begun() === ids.length);
  gate.emit('open');
  const streams = await Promise.all(ids.map((id) => client.whole(id)));
  for (const frames of streams) {
    expect(faultsOfStream(frames, frames[0]?.chunk.execution_id ?? '')).toEqual([]);
    expect(textOf(frames)).toBe(WORDS.join(''));
  }
  const [sample = []] = streams;
  expect(linesOf(sample)).toEqual(linesOf(await whole(sample[0]?.chunk.execution_id ?? '')));
  await client.close();
});

itInFull('a long replay lets short streams of the same socket come in between', async () => {
  const long = Array.from({ length: 300 }, (_, index) => `${index} `.padEnd(16_384, 'x'));
  const first = await studio.stream({ deployment_name: spoken, query: speech(long) });
  const frames = await first.frames();
  const client = await WsClient.open(server.url);
  const replay = client.send('subscribe', { execution_id: first.executionId });
  const short = Array.from({ length: 20 }, () =>
    client.send('execute', { deployment_name: echoed, query: 'short' }),
  );
  await client.whole(replay);
  const isEnd = (id: string) =>
    client.answers.findIndex((answer) => answer.event === 'end' && answer.id === id);
  await Promise.all(short.map((id) => client.whole(id)));
  const end = isEnd(replay);
  expect(short.filter((id) => isEnd(id) < end).length).toBeGreaterThan(0);
  expect(linesOf(client.frames(replay))).toEqual(linesOf(frames));
  await client.close();
});

/** What one client does with its executions: when it stops to follow one, and when its socket is cut. */
const deeds = fc.oneof(
  {
    weight: 3,
    arbitrary: fc.record({ kind: fc.constant('unsubscribe' as const), stream: fc.nat(7), ms: fc.nat(12) }),
  },
  {
    weight: 2,
    arbitrary: fc.record({
      kind: fc.constantFrom('reset', 'close', 'move'),
      stream: fc.nat(7),
      ms: fc.nat(12),
    }),
  },
);
const plays = fc.record({
  speeches: fc.array(
    fc.record({
      words: fc.array(fc.string({ unit: 'binary', minLength: 1, maxLength: 12 }), { maxLength: 30 }),
      long: fc.boolean(),
      pause: fc.nat(3),
    }),
    { minLength: 1, maxLength: 8 },
  ),
  deeds: fc.array(deeds, { maxLength: 12 }),
});
type Play = typeof plays extends fc.Arbitrary<infer Value> ? Value : never;

/** Executes all speeches on one socket, and loses streams and sockets on the way; every stream goes on where it was. */
class Player {
  readonly frames = new Map<string, Frame[]>();
  readonly faults: string[] = [];
  readonly tally = { reconnects: 0, unsubscribes: 0 };
  private readonly ended = new Set<string>();
  private place = 0;

  private constructor(private client: WsClient) {}

  static async play({ speeches, deeds: all }: Play): Promise<Player> {
    const player = new Player(await WsClient.open(server.url));
    const queries = speeches.map(({ words, long, pause }) =>
      speech(long ? words.map((word) => word.repeat(2000)) : words, pause),
    );
    const ids = queries.map((query) =>
      player.client.send('execute', { deployment_name: spoken, query, idempotency_key: query }),
    );
    for (const id of ids) {
      const { data } = await player.client.answer((answer) => answer.id === id);
      player.frames.set(String(data['execution_id']), []);
    }
    for (const deed of all) {
      await sleep(deed.ms);
      await player.do(deed);
    }
    await player.client.until(() => player.take());
    await player.client.close();
    return player;
  }

  /** Takes over what came, by the execution that each chunk names. @returns whether all streams have ended */
  private take(): boolean {
    for (const { event, after, data, raw } of this.client.answers.splice(0)) {
      const executionId = String(data['execution_id']);
      const frames = this.frames.get(executionId);
      if (event === 'error') this.faults.push(raw);
      if (event === 'end') this.ended.add(executionId);
      if (event !== 'chunk' || !frames) continue;
      if (after !== frames.length + 1)
        this.faults.push(`${after} follows ${frames.length} of ${executionId}`);
      const text = raw.slice(raw.indexOf('"data":') + 7, -1);
      frames.push({ id: `${executionId}:${after}`, data: text, chunk: JSON.parse(text) as Frame['chunk'] });
    }
    return this.ended.size === this.frames.size;
  }

  private async do({ kind, stream }: Play['deeds'][number]): Promise<void> {
    if (kind === 'unsubscribe') {
      const executionId = [...this.frames.keys()][stream % this.frames.size] ?? '';
      const { raw } = await this.client.ask('unsubscribe', { execution_id: executionId });
      const at = this.client.answers.findIndex((answer) => answer.raw === raw);
      const later = this.client.answers
        .slice(at + 1)
        .filter(({ data }) => data['execution_id'] === executionId);
      if (later.length > 0) this.faults.push(`${later.length} frames follow "unsubscribed"`);
      this.tally.unsubscribes++;
      this.take();
      if (!this.ended.has(executionId)) {
        await this.client.ask('subscribe', {
          execution_id: executionId,
          after: this.frames.get(executionId)?.length,
        });
      }
      return;
    }
    if (kind === 'reset') this.client.reset();
    else if (kind === 'close') this.client.webSocket.close();
    else this.client.webSocket.terminate();
    await this.client.over();
    this.take();
    this.place = 1 - this.place;
    this.client = await WsClient.open(this.place === 0 ? server.url : other.url);
    this.tally.reconnects++;
    await this.follow();
  }

  /** Follows on a new socket what has not come to its end. */
  private async follow(): Promise<void> {
    const open = [...this.frames].filter(([executionId]) => !this.ended.has(executionId));
    const asked = open.map(([executionId, frames]) =>
      this.client.ask('subscribe', { execution_id: executionId, after: frames.length }),
    );
    await Promise.all(asked);
  }
}

describe('whatever is unsubscribed and wherever sockets break', () => {
  it('each stream is whole, at two processes, to the byte of its SSE stream', async () => {
    const tally = { reconnects: 0, unsubscribes: 0, streams: 0 };
    const property = fc.asyncProperty(plays, async (play) => {
      const player = await Player.play(play);
      expect(player.faults).toEqual([]);
      for (const [executionId, frames] of player.frames) {
        expect(faultsOfStream(frames, executionId)).toEqual([]);
        expect(linesOf(frames)).toEqual(linesOf(await whole(executionId)));
      }
      tally.streams += player.frames.size;
      tally.reconnects += player.tally.reconnects;
      tally.unsubscribes += player.tally.unsubscribes;
    });
    await fc.assert(property, {
      numRuns: RUNS,
      interruptAfterTimeLimit: LONGEST_SEARCH_MS,
      markInterruptAsFailure: true,
    });
    // So that it does not pass because nothing happened.
    expectByChance('streams', tally.streams, rounds(30, 5));
    expectByChance('connections made again', tally.reconnects, rounds(15, 1));
    expectByChance('ends of subscriptions', tally.unsubscribes, rounds(15, 0));
  }, 330_000);
});

describe('four of five sockets leave at random moments, each with several streams', () => {
  const leaver = fc.record({ after: fc.nat(60), resets: fc.boolean() });
  it('and the fifth has everything', async () => {
    const round = async (leaving: { after: number; resets: boolean }[]) => {
      const words = Array.from({ length: 30 }, (_, index) => `word ${index} `);
      const starter = await WsClient.open(server.url);
      const queries = Array.from({ length: 3 }, () => speech(words, 1));
      const begun = await Promise.all(
        queries.map((query) => starter.execute({ deployment_name: spoken, query })),
      );
      const followers = await Promise.all(leaving.map(() => WsClient.open(server.url)));
      const fifth = followers.at(-1) ?? starter;
      const asked = followers.map((client) =>
        Promise.all(begun.map(({ executionId }) => client.ask('subscribe', { execution_id: executionId }))),
      );
      const leave = async (client: WsClient, plan: { after: number; resets: boolean } | undefined) => {
        const isOver = () => client.answers.filter(({ event }) => event === 'end').length === 3;
        await client.until(() => client.answers.length >= (plan?.after ?? 0) || isOver());
        if (plan?.resets) client.reset();
        else client.webSocket.close();
        await client.over();
      };
      const leavers = [starter, ...followers.slice(0, -1)];
      const left = leavers.map((client, index) => leave(client, leaving[index]).catch(() => undefined));
      const subscribed = (await Promise.allSettled(asked)).at(-1);
      if (subscribed?.status !== 'fulfilled') throw new Error('The fifth could not subscribe.');
      for (const { id } of subscribed.value) {
        const frames = await fifth.whole(String(id));
        expect(faultsOfStream(frames, frames[0]?.chunk.execution_id ?? '')).toEqual([]);
        expect(textOf(frames)).toBe(words.join(''));
      }
      await Promise.all(left);
      await fifth.close();
    };
    const leavers = fc.array(leaver, { minLength: 4, maxLength: 4 });
    await fc.assert(fc.asyncProperty(leavers, round), { numRuns: rounds(10, 2), endOnFailure: true });
  });
});

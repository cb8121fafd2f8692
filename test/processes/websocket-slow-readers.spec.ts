import { createHash } from 'node:crypto';
import { EventEmitter, once } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, expect, it } from '@jest/globals';
import { createTestDatabase } from '../support/database.js';
import type { TestDatabase } from '../support/database.js';
import { ONE_KIB_A_SECOND, PacedConnection } from '../support/slow-reader.js';
import { ServerProcess } from '../support/studio-process.js';
import { Studio, faultsOfStream, textOf, until, upstreamAgent } from '../support/studio.js';
import type { Frame } from '../support/studio.js';
import { Upstream, chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import type { UpstreamRequest } from '../support/upstream.js';
import { WsClient } from '../support/ws-client.js';

const MIB = 1024 * 1024;
const SOCKETS = 25;
const STREAMS = 50;
/** This long is what is tested, and no wait for anything. */
const STALL_MS = 5000;
const SAMPLE_MS = 2500;
/** What stalled sockets may make the server hold. */
const MOST_HELD = 40 * MIB;
/** The same for one of them, however many streams it has: a piece, its frames and what the allocator has not given back. */
const MOST_HELD_BY_ONE = 16 * MIB;

/** What the upstream says, by the query that it is asked. */
const answers: Record<string, string[]> = {
  long: numbered(5000, 4096),
  /** Once the gate is open. */
  gated: numbered(100, 4096),
  neighbour: numbered(2000, 12),
};

const gate = new EventEmitter().setMaxListeners(0);
const isGated = ({ body }: UpstreamRequest) => JSON.stringify(body).includes('gated');
let upstream: Upstream;
let database: TestDatabase;
let server: ServerProcess;
let studio: Studio;
let deployment: string;

beforeAll(async () => {
  upstream = await Upstream.start(async (response, { body }) => {
    const messages = body.messages as { content: string }[];
    const [query = ''] = messages.at(-1)?.content.split(' ') ?? [];
    if (query === 'gated') await once(gate, 'open');
    for (const delta of answers[query] ?? []) {
      writeStream(response, chatDelta(delta));
      if (response.writableNeedDrain) await once(response, 'drain');
    }
    writeStream(response, chatEnd());
    response.end();
  });
  database = await createTestDatabase();
  server = await ServerProcess.start({
    DATABASE_URL: database.url,
    STREAM_FLUSH_INTERVAL_MS: '1',
    // Slow peers live, whatever the heartbeat; a busy machine takes some time until the socket of one that does not answer is full.
    HEARTBEAT_INTERVAL_MS: '10000',
    MODEL_PROVIDERS: JSON.stringify({ upstream: { type: 'openai-compatible', base_url: upstream.url } }),
  });
  studio = new Studio(server.url);
  deployment = await studio.deploy(upstreamAgent());
});
afterAll(async () => {
  await server.stop('SIGKILL');
  await database.drop();
  await upstream.stop();
});

/** Texts of one length that say which of them they are. */
function numbered(count: number, length: number): string[] {
  return Array.from({ length: count }, (_, index) => `${index} `.padEnd(length, 'x'));
}

const hash = (text: string) => createHash('sha256').update(text).digest('hex');
const hashOfAnswer = (query: string) => hash(answers[query]?.join('') ?? '');

async function openSlow(): Promise<{ connection: PacedConnection; client: WsClient }> {
  const connection = new PacedConnection(new URL(server.url), ONE_KIB_A_SECOND);
  const client = await WsClient.open(server.url, { createConnection: () => connection as never });
  return { connection, client };
}

/** A fast client's whole stream, whose faults and text have been checked. */
async function readFast(query: string): Promise<Frame[]> {
  const client = await WsClient.open(server.url);
  const { id, executionId } = await client.execute({ deployment_name: deployment, query });
  const frames = await client.whole(id);
  await client.close();
  expect(faultsOfStream(frames, executionId)).toEqual([]);
  expect(hash(textOf(frames))).toBe(hashOfAnswer(query));
  return frames;
}

async function untilCompleted(executionIds: string[]): Promise<void> {
  for (const id of executionIds) {
    await until(async () => {
      const { body } = await studio.json<{ status: string }>(`/api/executions/${id}/progress`);
      return body.status === 'completed';
    }, 60_000);
  }
}

/** The most that the server held at any of the samples of the next while. */
async function mostHeld(): Promise<number> {
  let most = 0;
  for (const end = Date.now() + STALL_MS; Date.now() < end; await sleep(SAMPLE_MS)) {
    most = Math.max(most, (await server.held()).held);
  }
  return most;
}

const parked = async () => (await server.held('event-log/log-subscriptions.js', 'LogSubscription')).count;

it('25 sockets at 1 KiB a second neither fill the memory nor hold up the run or a neighbour, and miss nothing', async () => {
  await readFast('long');
  const warm = (await server.held()).held;
  const { body } = await studio.json<{ execution_id: string }>('/api/workflows/execute/async', {
    method: 'POST',
    body: { deployment_name: deployment, query: 'long' },
  });
  const slow = await Promise.all(Array.from({ length: SOCKETS }, openSlow));
  try {
    await Promise.all(slow.map(({ client }) => client.ask('subscribe', { execution_id: body.execution_id })));
    await untilCompleted([body.execution_id]);
    const most = mostHeld();
    await readFast('neighbour');
    expect((await most) - warm).toBeLessThan(MOST_HELD);
    for (const { connection } of slow) {
      expect(connection.received).toBeGreaterThan(0);
      expect(connection.received).toBeLessThan(MIB);
    }
    // All of them are there still: merely slow is not dead. And none keeps a reader of the log.
    expect(await server.metric('agent_studio_websocket_subscriptions')).toBe(SOCKETS);
    expect(await parked()).toBe(0);

    const [first, ...others] = slow;
    others.forEach(({ connection }) => connection.destroy());
    first?.connection.hurry();
    await first?.client.answer(({ event }) => event === 'end');
    const frames = first?.client.frames(String(first.client.answers[0]?.id)) ?? [];
    expect(faultsOfStream(frames, body.execution_id)).toEqual([]);
    expect(hash(textOf(frames))).toBe(hashOfAnswer('long'));
    await until(async () => (await server.metric('agent_studio_websocket_subscriptions')) === 0);
  } finally {
    slow.forEach(({ connection }) => connection.destroy());
  }
}, 180_000);

it('50 streams on one socket that does not read wait with empty hands, and all come whole when it reads', async () => {
  const client = await WsClient.open(server.url);
  try {
    const begun = await Promise.all(
      Array.from({ length: STREAMS }, (_, index) =>
        client.execute({ deployment_name: deployment, query: `gated ${index}` }),
      ),
    );
    await until(() => upstream.requests.filter(isGated).length === STREAMS);
    const warm = (await server.held()).held;
    client.socket.pause();
    gate.emit('open');
    await untilCompleted(begun.map(({ executionId }) => executionId));
    await until(async () => (await parked()) === 0);
    expect((await mostHeld()) - warm).toBeLessThan(MOST_HELD_BY_ONE);
    expect(await server.metric('agent_studio_websocket_subscriptions')).toBeGreaterThan(STREAMS - 20);
    await readFast('neighbour');

    client.socket.resume();
    for (const { id, executionId } of begun) {
      const frames = await client.whole(id);
      expect(faultsOfStream(frames, executionId)).toEqual([]);
      expect(hash(textOf(frames))).toBe(hashOfAnswer('gated'));
    }
  } finally {
    client.reset();
  }
}, 180_000);

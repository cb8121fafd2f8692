import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, expect, it } from '@jest/globals';
import { createTestDatabase } from '../support/database.js';
import type { TestDatabase } from '../support/database.js';
import { SlowReader } from '../support/slow-reader.js';
import { ServerProcess } from '../support/studio-process.js';
import { Studio, faultsOfStream, textOf, until, upstreamAgent } from '../support/studio.js';
import type { Frame } from '../support/studio.js';
import { Upstream, chatDelta, chatEnd, writeStream } from '../support/upstream.js';

const MIB = 1024 * 1024;
const READERS = 25;
/** This long is what is tested, and no wait for anything. */
const STALL_MS = 5000;
const SAMPLE_MS = 2500;
/** What stalled readers may make the server hold, and the process grow: its allocator keeps some of what a run gave back. */
const MOST_HELD = 40 * MIB;
const MOST_RESIDENT = 96 * MIB;
const RUN_MS = 150_000;

/** What the upstream says, by the query that it is asked. */
const answers: Record<string, string[]> = {
  '20 MB': numbered(5000, 4096),
  neighbour: numbered(5000, 12),
  'MB by MB': ['a', ...numbered(8, MIB), 'z', ...numbered(2, MIB)],
  'word by word': numbered(30_000, 7),
};

let upstream: Upstream;
let database: TestDatabase;
let server: ServerProcess;
let studio: Studio;
let deployment: string;

beforeAll(async () => {
  upstream = await Upstream.start(async (response, { body }) => {
    const messages = body.messages as { content: string }[];
    for (const delta of answers[messages.at(-1)?.content ?? ''] ?? []) {
      writeStream(response, chatDelta(delta));
      if (response.writableNeedDrain) await once(response, 'drain');
    }
    writeStream(response, chatEnd());
    response.end();
  });
  database = await createTestDatabase();
  server = await ServerProcess.start({
    DATABASE_URL: database.url,
    // 20 MB would take a fast reader five seconds at the usual pace.
    STREAM_FLUSH_INTERVAL_MS: '1',
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
const hashOfChunks = (frames: Frame[]) => hash(frames.map(({ data }) => data).join('\n'));
const hashOfAnswer = (query: string) => hash(answers[query]?.join('') ?? '');

async function start(query: string): Promise<string> {
  const { body } = await studio.json<{ execution_id: string }>('/api/workflows/execute/async', {
    method: 'POST',
    body: { deployment_name: deployment, query },
  });
  return body.execution_id;
}

const streamOf = (executionId: string) => `${server.url}/api/executions/${executionId}/stream`;

async function untilCompleted(executionId: string): Promise<void> {
  await until(async () => {
    const { body } = await studio.json<{ status: string }>(`/api/executions/${executionId}/progress`);
    if (body.status === 'error') throw new Error('The execution failed.');
    return body.status === 'completed' || undefined;
  }, RUN_MS);
}

/** A fast reader's whole stream, whose faults and text have been checked. */
async function readFast(query: string): Promise<Frame[]> {
  const stream = await studio.stream({ deployment_name: deployment, query });
  const frames = await stream.frames();
  expect(faultsOfStream(frames, stream.executionId)).toEqual([]);
  expect(hash(textOf(frames))).toBe(hashOfAnswer(query));
  return frames;
}

/** Bytes after a garbage collection: what the heap and its buffers hold, and what the process has. */
async function memory(): Promise<{ held: number; resident: number }> {
  const { held } = await server.held();
  return { held, resident: (await server.memory()).now };
}

/** The most memory at any of the samples until `end`. Garbage of the run itself is no sample: it waits for its end. */
async function mostMemory(run: Promise<void>, end: number): Promise<{ held: number; resident: number }> {
  await run;
  const most = await memory();
  for (let left = end - Date.now(); left > 0; left = end - Date.now()) {
    await sleep(Math.min(left, SAMPLE_MS));
    const sample = await memory();
    most.held = Math.max(most.held, sample.held);
    most.resident = Math.max(most.resident, sample.resident);
  }
  return most;
}

it('25 readers at 1 KiB a second neither fill the memory nor hold up the run or a neighbour, and miss nothing', async () => {
  // The warm baseline: after the same run, read by one fast reader, so that code and heap have the size that it takes.
  await readFast('20 MB');
  const warm = await memory();

  const executionId = await start('20 MB');
  const opening = Array.from({ length: READERS }, () => SlowReader.open(streamOf(executionId)));
  const readers = await Promise.all(opening);
  try {
    const most = mostMemory(untilCompleted(executionId), Date.now() + STALL_MS);
    await readFast('neighbour');
    const stalled = await most;

    for (const { received } of readers) {
      expect(received).toBeGreaterThan(0);
      expect(received).toBeLessThan(MIB);
    }
    expect(stalled.held - warm.held).toBeLessThan(MOST_HELD);
    expect(stalled.resident - warm.resident).toBeLessThan(MOST_RESIDENT);
    // All of them still wait for most of it: it has not just gone into the buffers of the network.
    expect(await server.metric('agent_studio_open_streams')).toBe(READERS);

    const [slow, ...others] = readers;
    others.forEach((reader) => reader.leave());
    slow?.hurry();
    const frames = (await slow?.stream.frames()) ?? [];
    expect(faultsOfStream(frames, executionId)).toEqual([]);
    expect(hash(textOf(frames))).toBe(hashOfAnswer('20 MB'));
    const fast = await (await studio.follow(executionId)).frames();
    expect(hashOfChunks(frames)).toBe(hashOfChunks(fast));
    await until(async () => (await server.metric('agent_studio_open_streams')) === 0 || undefined);
  } finally {
    readers.forEach((reader) => reader.leave());
  }
}, 180_000);

it.each(['MB by MB', 'word by word'])(
  'an answer that comes %s reaches a reader whole whose socket is full again and again',
  async (query) => {
    const executionId = await start(query);
    const reader = await SlowReader.open(streamOf(executionId), { bytes: 16 * 1024, pauseMs: 5 });
    try {
      const frames = await reader.stream.frames();
      expect(faultsOfStream(frames, executionId)).toEqual([]);
      expect(textOf(frames)).toBe(answers[query]?.join(''));
    } finally {
      reader.leave();
    }
  },
);

import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, expect, it } from '@jest/globals';
import { BatchRoutes, byItem, faultsOfMerged, linesOf } from '../support/batches.js';
import { createTestDatabase } from '../support/database.js';
import type { TestDatabase } from '../support/database.js';
import { SlowReader } from '../support/slow-reader.js';
import { ServerProcess } from '../support/studio-process.js';
import { Studio, textOf, until, upstreamAgent } from '../support/studio.js';
import type { Frame } from '../support/studio.js';
import { Upstream, chatDelta, chatEnd, writeStream } from '../support/upstream.js';

const MIB = 1024 * 1024;
const READERS = 20;
/** What one reader is sent in all is far more than what fits into the buffers on its way. */
const ITEMS = 10;
const DELTAS = 250;
const DELTA_BYTES = 4096;
/** This long is what is tested, and no wait for anything. */
const STALL_MS = 4000;
const SAMPLE_MS = 2000;
/** What the stalled readers may make the server hold; if all that they have not read waited for them, it were 300 MB. */
const MOST_HELD = 48 * MIB;
const MOST_RESIDENT = 96 * MIB;

let upstream: Upstream;
let database: TestDatabase;
let server: ServerProcess;
let batches: BatchRoutes;
let deployment: string;

beforeAll(async () => {
  upstream = await Upstream.start(async (response, { body }) => {
    const query = (body.messages as { content: string }[]).at(-1)?.content ?? '';
    for (const delta of deltasOf(query)) {
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
    MODEL_PROVIDERS: JSON.stringify({ upstream: { type: 'openai-compatible', base_url: upstream.url } }),
  });
  batches = new BatchRoutes(new Studio(server.url));
  deployment = await batches.studio.deploy(upstreamAgent());
});
afterAll(async () => {
  await server.stop('SIGKILL');
  await database.drop();
  await upstream.stop();
});

/** Texts that say which of them they are, and of which item; of a neighbour's items short ones. */
function deltasOf(query: string): string[] {
  const length = query.startsWith('large') ? DELTA_BYTES : 12;
  return Array.from({ length: DELTAS }, (_, index) => `${query} ${index} `.padEnd(length, 'x'));
}

const batchOf = (name: string) => ({
  deployment_name: deployment,
  items: Array.from({ length: ITEMS }, (_, index) => ({ query: `${name} ${index}` })),
});
const hash = (text: string) => createHash('sha256').update(text).digest('hex');

function expectWhole(frames: Frame[], batchId: string, name: string): void {
  expect(faultsOfMerged(frames, batchId)).toEqual([]);
  for (const [item, chunks] of byItem(frames)) {
    expect(hash(textOf(chunks))).toBe(hash(deltasOf(`${name} ${item}`).join('')));
  }
}

/** A fast reader's whole stream, which has been checked. */
async function readFast(name: string): Promise<void> {
  const stream = await batches.stream(batchOf(name));
  expectWhole(await stream.frames(), stream.executionId, name);
}

/** Bytes after a garbage collection: what the heap and its buffers hold, and what the process has. */
async function memory(): Promise<{ held: number; resident: number }> {
  const { held } = await server.held();
  return { held, resident: (await server.memory()).now };
}

it('20 readers at 1 KiB a second of a batch neither fill the memory nor hold up it or a neighbour, and miss nothing', async () => {
  // The warm baseline: after the same batch, read by one fast reader, so that code and heap have the size that it takes.
  await readFast('large');
  const warm = await memory();

  const { batch_id } = await batches.accept(batchOf('large'));
  const url = `${server.url}/api/batches/${batch_id}/stream`;
  const readers = await Promise.all(Array.from({ length: READERS }, () => SlowReader.open(url)));
  try {
    await until(async () => (await batches.get(batch_id)).status === 'completed' || undefined, 60_000);
    await readFast('neighbour');
    const most = { held: 0, resident: 0 };
    for (let waited = 0; waited <= STALL_MS; waited += SAMPLE_MS) {
      const { held, resident } = await memory();
      most.held = Math.max(most.held, held);
      most.resident = Math.max(most.resident, resident);
      await sleep(SAMPLE_MS);
    }
    for (const { received } of readers) {
      expect(received).toBeGreaterThan(0);
      expect(received).toBeLessThan(MIB);
    }
    expect(most.held - warm.held).toBeLessThan(MOST_HELD);
    expect(most.resident - warm.resident).toBeLessThan(MOST_RESIDENT);
    // All of them still wait for most of it: it has not just gone into the buffers of the network.
    expect(await server.metric('agent_studio_open_streams')).toBe(READERS);

    const [slow, ...others] = readers;
    others.forEach((reader) => reader.leave());
    slow?.hurry();
    const frames = (await slow?.stream.frames()) ?? [];
    expectWhole(frames, batch_id, 'large');
    expect(hash(linesOf(frames).join())).toBe(hash(linesOf(await batches.whole(batch_id)).join()));
    await until(async () => (await server.metric('agent_studio_open_streams')) === 0 || undefined);
  } finally {
    readers.forEach((reader) => reader.leave());
  }
}, 120_000);

it('a merged stream reaches a reader whole whose socket is full again and again', async () => {
  const { batch_id } = await batches.accept(batchOf('neighbour'));
  const url = `${server.url}/api/batches/${batch_id}/stream`;
  const reader = await SlowReader.open(url, { bytes: 16 * 1024, pauseMs: 5 });
  try {
    expectWhole(await reader.stream.frames(), batch_id, 'neighbour');
  } finally {
    reader.leave();
  }
});

import { createHash } from 'node:crypto';
import { expect, it } from '@jest/globals';
import { Studio, faultsOfStream, textOf, upstreamAgent } from '../support/studio.js';
import type { Frame } from '../support/studio.js';
import { chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import { withProcesses } from '../support/with-processes.js';

/** Only ends a test that hangs. */
const HANG_MS = 90_000;

const WORDS = Array.from({ length: 10_000 }, (_, index) => `w${index} `);
/** What the upstream answers with, by the query that it is asked. */
const answers: Record<string, string[]> = {
  'many chunks': WORDS,
  'one chunk of 1 MiB': ['x0123456789abcde'.repeat(65_536)],
};
const system = withProcesses({
  upstream: (response, { query }) => {
    writeStream(response, ...(answers[query] ?? ['nothing']).map(chatDelta), chatEnd());
    response.end();
  },
});

const hash = (frames: Frame[]) => createHash('sha256').update(textOf(frames)).digest('hex');

it('big output has the same hash live and replayed, and does not stay in memory', async () => {
  const outside = await system.start();
  const client = new Studio(outside.url);
  const signal = AbortSignal.timeout(HANG_MS);
  const deployment = await client.deploy(upstreamAgent());
  await (await client.stream({ deployment_name: deployment, query: 'warm up' })).frames();
  const before = await outside.memory();
  for (const [query, deltas] of Object.entries(answers)) {
    const stream = await client.stream({ deployment_name: deployment, query }, { signal });
    const frames = await stream.frames();
    expect(faultsOfStream(frames, stream.executionId)).toEqual([]);
    expect(frames.length).toBeGreaterThanOrEqual(deltas.length + 2); // a long text comes in several chunks
    expect(frames.every(({ data }) => Buffer.byteLength(data) <= 48 * 1024)).toBe(true);
    expect(hash(frames)).toBe(createHash('sha256').update(deltas.join('')).digest('hex'));
    const replayed = await client.follow(stream.executionId, undefined, { signal });
    expect(hash(await replayed.frames())).toBe(hash(frames));
  }
  expect((await outside.memory()).peak - before.now).toBeLessThan(100 * 1024 * 1024);
});

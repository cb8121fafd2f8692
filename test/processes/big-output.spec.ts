import { createHash } from 'node:crypto';
import { expect, it } from '@jest/globals';
import { harmsOf, withBystander } from '../support/bystander.js';
import { inconclusive } from '../support/inconclusive.js';
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
  upstream: (response, { query, body }) => {
    if (!body.stream) return response.end(inOnePiece(query));
    writeStream(response, ...(answers[query] ?? ['nothing']).map(chatDelta), chatEnd());
    return response.end();
  },
});

/** An answer of about 12 MiB, as an OpenAI-compatible server gives it where nobody asked for a stream. */
const inOnePiece = (query: string) => {
  const message = { role: 'assistant', content: `${query} `.repeat((12 * 1024 * 1024) / (query.length + 1)) };
  return JSON.stringify({ choices: [{ index: 0, message, finish_reason: 'stop' }] });
};

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

it(
  'an answer of 12 MiB in one piece is kept whole, and holds up no end of another execution',
  async () => {
    const server = await system.start();
    const client = new Studio(server.url);
    const deployment_name = await client.deploy(upstreamAgent({ streaming: false }));
    const witness = await withBystander(server, () =>
      client.execute<{ response: string }>({ deployment_name, query: 'words' }),
    );
    expect(witness.outcome.status).toBe(200);
    expect(witness.outcome.body.response.length).toBeGreaterThan(12 * 1024 * 1024 - 6);
    expect(witness.attacked.faults).toEqual([]);
    const delays = harmsOf(witness).filter(({ what }) => what.startsWith('slowest'));
    expect(delays.filter(({ isNoisy }) => !isNoisy)).toEqual([]);
    delays.forEach(({ what }) => inconclusive(what));
  },
  HANG_MS,
);

import { createHash } from 'node:crypto';
import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { startTestApp } from '../support/app.js';
import { createTestDatabase } from '../support/database.js';
import { ServerProcess } from '../support/studio-process.js';
import type { TestApp } from '../support/app.js';
import { Studio, echo, faultsOfStream, textOf, until, upstreamAgent } from '../support/studio.js';
import type { Frame } from '../support/studio.js';
import { Upstream, chatDelta, chatEnd, writeStream } from '../support/upstream.js';

/** What the upstream answers with, by the query that it is asked. */
const answers = new Map<string, string[]>();
let upstream: Upstream;
let server: TestApp;
let studio: Studio;

beforeAll(async () => {
  upstream = await Upstream.start((response, { body }) => {
    const messages = body.messages as { content: string }[];
    const deltas = answers.get(messages.at(-1)?.content ?? '') ?? ['nothing'];
    writeStream(response, ...deltas.map(chatDelta), chatEnd());
    response.end();
  });
  const provider = { type: 'openai-compatible', base_url: upstream.url };
  server = await startTestApp({ MODEL_PROVIDERS: JSON.stringify({ upstream: provider }) });
  studio = new Studio(server.url);
});
afterAll(async () => {
  await server.close();
  await upstream.stop();
});

async function whole(
  deployment: string,
  query: string,
): Promise<{ id: string; frames: Frame[]; raw: string }> {
  const stream = await studio.stream({ deployment_name: deployment, query });
  const frames = await stream.frames();
  return { id: stream.executionId, frames, raw: stream.raw };
}

describe('a stream', () => {
  it('begins with `started` and sequence 1, also when many begin at the same moment', async () => {
    const deployment = await studio.deploy(echo());
    const faults: string[] = [];
    let done = 0;
    const client = async () => {
      for (let run = 0; run < 30; run++) {
        const { id, frames } = await whole(deployment, `run ${run}`);
        faults.push(...faultsOfStream(frames, id));
        done++;
      }
    };
    await Promise.all(Array.from({ length: 8 }, client));
    expect(faults).toEqual([]);
    expect(done).toBe(240);
  });

  it('has strictly ascending ids without gaps at full speed', async () => {
    const deployment = await studio.deploy(echo());
    const query = Array.from({ length: 10_000 }, (_, index) => `w${index}`).join(' ');
    const { id, frames } = await whole(deployment, query);
    expect(faultsOfStream(frames, id)).toEqual([]);
    expect(frames.length).toBeGreaterThan(10_000);
    expect(textOf(frames)).toContain(query);
  });

  it('goes on without a gap or a repeat from every cut point', async () => {
    const deployment = await studio.deploy(upstreamAgent());
    answers.set(
      '200',
      Array.from({ length: 198 }, (_, index) => `token ${index}, `),
    );
    const { id, frames } = await whole(deployment, '200');
    expect(frames).toHaveLength(200);
    const lines = frames.map(({ data }) => data);
    const cutPoints = Array.from({ length: 199 }, (_, index) => index + 1);
    const rests = await Promise.all(cutPoints.map(async (cut) => (await studio.follow(id, cut)).frames()));
    rests.forEach((rest, index) => {
      expect([...lines.slice(0, cutPoints[index]), ...rest.map(({ data }) => data)]).toEqual(lines);
    });
    expect((await studio.follow(id, 200)).status).toBe(204);
  });

  it('goes on without a gap or a repeat when it is cut while it runs', async () => {
    let release = () => {};
    const held = new Promise<void>((resolve) => (release = resolve));
    const slow = await Upstream.start((response) => {
      void (async () => {
        for (let token = 0; token < 100; token++) {
          writeStream(response, chatDelta(`${token} `));
          if (token === 50) await held;
          else if (token % 10 === 0) await new Promise((resolve) => setImmediate(resolve));
        }
        writeStream(response, chatEnd());
        response.end();
      })();
    });
    const other = await startTestApp({
      MODEL_PROVIDERS: JSON.stringify({ upstream: { type: 'openai-compatible', base_url: slow.url } }),
    });
    try {
      const client = new Studio(other.url);
      const name = await client.deploy(upstreamAgent());
      const first = await client.stream({ deployment_name: name, query: 'x' });
      const head = await first.take(20);
      const second = await client.follow(first.executionId, 20);
      const middle = await second.take(10);
      release();
      const rest = await (await client.follow(first.executionId, 30)).frames();
      const frames = [...head, ...middle, ...rest];
      expect(faultsOfStream(frames, first.executionId)).toEqual([]);
      expect(textOf(frames)).toBe(Array.from({ length: 100 }, (_, token) => `${token} `).join(''));
    } finally {
      release();
      await other.close();
      await slow.stop();
    }
  });

  it('of a finished run is replayed after a restart of the server and ends', async () => {
    const first = await startTestApp({}, server.database);
    const client = new Studio(first.url);
    const deployment = await client.deploy(echo());
    const stream = await client.stream({ deployment_name: deployment, query: 'before the restart' });
    const frames = await stream.frames();
    await first.close();
    const second = await startTestApp({}, server.database);
    try {
      const again = new Studio(second.url);
      const replayed = await again.follow(stream.executionId);
      expect((await replayed.frames()).map(({ data }) => data)).toEqual(frames.map(({ data }) => data));
      expect((await again.follow(stream.executionId, frames.length)).status).toBe(204);
    } finally {
      await second.close();
    }
  });

  it('holds nothing of another run of the same deployment', async () => {
    const deployment = await studio.deploy(echo());
    const runs = await Promise.all(
      Array.from({ length: 100 }, async (_, run) => ({
        run,
        ...(await whole(deployment, `marker-${run}-end`)),
      })),
    );
    const faults = runs.flatMap(({ run, id, frames }) => [
      ...faultsOfStream(frames, id),
      ...(JSON.stringify(textOf(frames).match(/marker-\d+-end/g)) === `["marker-${run}-end"]`
        ? []
        : [`run ${run}`]),
    ]);
    expect(faults).toEqual([]);
    expect(new Set(runs.map(({ id }) => id)).size).toBe(100);
  });
});

describe('hostile text', () => {
  const texts = [
    'a\r\nb\rc\nd',
    'line\u2028separator\u2029',
    'nul\u0000nul',
    '\ufeffbom',
    '\n\nevent: x\ndata: {"type":"status","status":"completed"}\n\n',
    'id: 9\nretry: 1\n: comment',
    'emoji 👩‍👩‍👧‍👦 \u{10ffff}',
    '"quotes" \\ backslash </script> \u001e separator \u007f',
  ];

  it('comes back exactly, live and replayed, and forges no frame', async () => {
    const deployment = await studio.deploy(upstreamAgent());
    for (const [index, text] of texts.entries()) {
      answers.set(`hostile ${index}`, [text, text]);
      const { id, frames } = await whole(deployment, `hostile ${index}`);
      expect(faultsOfStream(frames, id)).toEqual([]);
      expect(frames).toHaveLength(4);
      expect(textOf(frames)).toBe(text + text);
      const replayed = await (await studio.follow(id)).frames();
      expect(replayed.map(({ data }) => data)).toEqual(frames.map(({ data }) => data));
      const { body } = await studio.json<{ response: string }>(`/api/executions/${id}`);
      expect(body.response).toBe(text + text);
    }
  });

  it('survives the way in as a query', async () => {
    const deployment = await studio.deploy(echo());
    for (const text of texts) {
      const { frames } = await whole(deployment, text);
      expect(textOf(frames)).toContain(text);
    }
  });

  it('with a lone surrogate does not break the stream or the log', async () => {
    const deployment = await studio.deploy(upstreamAgent());
    answers.set('lone', ['a\ud800', 'b', '\udc00c']);
    const { id, frames } = await whole(deployment, 'lone');
    expect(faultsOfStream(frames, id)).toEqual([]);
    expect(textOf(frames).toWellFormed()).toBe('a\ufffdb\ufffdc');
    const { status } = await studio.json(`/api/executions/${id}`);
    expect(status).toBe(200);
  });

  it('split in the middle of an emoji over two reads of the upstream arrives whole', async () => {
    const bytes = Buffer.from(chatDelta('👩‍👩‍👧‍👦!'));
    const splitting = await Upstream.start((response) => {
      void (async () => {
        response.socket?.setNoDelay(true);
        for (const byte of bytes) {
          writeStream(response, Buffer.from([byte]));
          await new Promise((resolve) => setImmediate(resolve));
        }
        writeStream(response, chatEnd());
        response.end();
      })();
    });
    const other = await startTestApp({
      MODEL_PROVIDERS: JSON.stringify({ upstream: { type: 'openai-compatible', base_url: splitting.url } }),
    });
    try {
      const client = new Studio(other.url);
      const name = await client.deploy(upstreamAgent());
      const stream = await client.stream({ deployment_name: name, query: 'x' });
      expect(textOf(await stream.frames())).toBe('👩‍👩‍👧‍👦!');
    } finally {
      await other.close();
      await splitting.stop();
    }
  });
});

describe('big output', () => {
  it('has the same hash live and replayed, and does not stay in memory', async () => {
    const words = Array.from({ length: 10_000 }, (_, index) => `w${index} `);
    const big = 'x0123456789abcde'.repeat(65_536);
    answers.set('many chunks', words);
    answers.set('one chunk of 1 MiB', [big]);
    const database = await createTestDatabase();
    const provider = { type: 'openai-compatible', base_url: upstream.url };
    const outside = await ServerProcess.start({
      DATABASE_URL: database.url,
      MODEL_PROVIDERS: JSON.stringify({ upstream: provider }),
    });
    try {
      const client = new Studio(outside.url);
      const deployment = await client.deploy(upstreamAgent());
      await (await client.stream({ deployment_name: deployment, query: 'warm up' })).frames();
      const before = await outside.memory();
      const expected = { 'many chunks': words.join(''), 'one chunk of 1 MiB': big };
      for (const [query, text] of Object.entries(expected)) {
        const stream = await client.stream({ deployment_name: deployment, query });
        const frames = await stream.frames();
        expect(faultsOfStream(frames, stream.executionId)).toEqual([]);
        expect(hash(frames)).toBe(createHash('sha256').update(text).digest('hex'));
        expect(hash(await (await client.follow(stream.executionId)).frames())).toBe(hash(frames));
      }
      expect((await outside.memory()).peak - before.now).toBeLessThan(100 * 1024 * 1024);
    } finally {
      await outside.stop();
      await database.drop();
    }
  });
});

const hash = (frames: Frame[]) => createHash('sha256').update(textOf(frames)).digest('hex');

it('leaves no stream open and nothing in the queue', async () => {
  const metric = (text: string, name: string) =>
    Number(new RegExp(`^${name} (\\d+)$`, 'm').exec(text)?.[1] ?? NaN);
  await until(async () => {
    const text = await (await fetch(`${server.url}/metrics`)).text();
    return (
      (metric(text, 'agent_studio_open_streams') === 0 && metric(text, 'agent_studio_queue_depth') === 0) ||
      undefined
    );
  });
});

import type { ServerResponse } from 'node:http';
import { setImmediate as nextTurn } from 'node:timers/promises';
import { describe, expect, it } from '@jest/globals';
import { rounds } from '../support/effort.js';
import { echo, faultsOfStream, textOf, until, upstreamAgent } from '../support/studio.js';
import type { Frame } from '../support/studio.js';
import { chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import { withStudio } from '../support/with-studio.js';

/** Only ends a test that hangs. */
const HANG_MS = 90_000;

/** An answer of the upstream that a test lets out piece by piece. */
class HeldUpstream {
  private said = 0;
  private allowed = 0;
  private wake = () => {};
  private heard = () => {};
  private closed = false;

  constructor(private readonly deltas: string[]) {}

  /** Allows so many pieces, and resolves when the upstream has said them, or when nobody listens any more. */
  async sayUpTo(count: number): Promise<void> {
    this.allowed = count;
    this.wake();
    while (this.said < count && !this.closed) await new Promise<void>((resolve) => (this.heard = resolve));
  }

  async answer(response: ServerResponse): Promise<void> {
    response.on('close', () => {
      this.closed = true;
      this.heard();
    });
    for (const delta of this.deltas) {
      while (this.said === this.allowed) await new Promise<void>((resolve) => (this.wake = resolve));
      writeStream(response, chatDelta(delta));
      this.said++;
      this.heard();
      await nextTurn();
    }
    response.end(chatEnd());
  }
}

const FAMILY = '👩‍👩‍👧‍👦!';

/** Says {@link FAMILY} so that each byte is a packet of its own. */
async function sayByteByByte(response: ServerResponse): Promise<void> {
  response.socket?.setNoDelay(true);
  for (const byte of Buffer.from(chatDelta(FAMILY))) {
    writeStream(response, Buffer.from([byte]));
    await nextTurn();
  }
  writeStream(response, chatEnd());
  response.end();
}

/** What the upstream answers with, by the query that it is asked. */
const answers = new Map<string, string[]>();
const holding = new Map<string, HeldUpstream>();
const server = withStudio({
  upstream: (response, { query }) => {
    if (query === 'byte by byte') return sayByteByByte(response);
    const held = holding.get(query);
    if (held) return held.answer(response);
    const deltas = answers.get(query) ?? ['nothing'];
    writeStream(response, ...deltas.map(chatDelta), chatEnd());
    return response.end();
  },
});
const { studio } = server;

async function whole(
  deployment: string,
  query: string,
): Promise<{ id: string; frames: Frame[]; raw: string }> {
  const stream = await studio.stream({ deployment_name: deployment, query });
  const frames = await stream.frames();
  return { id: stream.executionId, frames, raw: stream.raw };
}

/** How many streams each of eight clients begins, one after the other. */
const RUNS_OF_A_CLIENT = rounds(15, 4);

/** The events of a stream as they came, without the `retry` that each connection begins with. */
const eventsOf = (raw: string) => raw.replace('retry: 1000\n', '').split(/(?<=\n\n)/);

describe('a stream', () => {
  it('begins with `started` and sequence 1, also when many begin at the same moment', async () => {
    const deployment = await studio.deploy(echo());
    const faults: string[] = [];
    let done = 0;
    const client = async () => {
      for (let run = 0; run < RUNS_OF_A_CLIENT; run++) {
        const { id, frames } = await whole(deployment, `run ${run}`);
        faults.push(...faultsOfStream(frames, id));
        done++;
      }
    };
    await Promise.all(Array.from({ length: 8 }, client));
    expect(faults).toEqual([]);
    expect(done).toBe(8 * RUNS_OF_A_CLIENT);
  });

  it('has strictly ascending ids without gaps at full speed', async () => {
    const deployment = await studio.deploy(echo());
    const query = Array.from({ length: 10_000 }, (_, index) => `w${index}`).join(' ');
    const { id, frames } = await whole(deployment, query);
    expect(faultsOfStream(frames, id)).toEqual([]);
    expect(frames.length).toBeGreaterThan(10_000);
    expect(textOf(frames)).toContain(query);
  });

  it('goes on from every cut point, byte for byte', async () => {
    const count = rounds(100, 50);
    const deployment = await studio.deploy(upstreamAgent());
    answers.set(
      'cut',
      Array.from({ length: count - 2 }, (_, index) => `token ${index}, `),
    );
    const { id, frames, raw } = await whole(deployment, 'cut');
    expect(frames).toHaveLength(count);
    const events = eventsOf(raw);
    const rests = await Promise.all(
      events.slice(1).map(async (_, index) => {
        const rest = await studio.follow(id, index + 1);
        await rest.frames();
        return eventsOf(rest.raw);
      }),
    );
    expect(rests).toHaveLength(count - 1);
    rests.forEach((rest, index) => expect([...events.slice(0, index + 1), ...rest]).toEqual(events));
    expect((await studio.follow(id, count)).status).toBe(204);
  });

  it('goes on from every cut point while it runs', async () => {
    const held = new HeldUpstream(Array.from({ length: 198 }, (_, token) => `${token} `));
    holding.set('held', held);
    const deployment = await studio.deploy(upstreamAgent());
    const begun = await studio.stream({ deployment_name: deployment, query: 'held' });
    const id = begun.executionId;
    const first = begun.frames();
    await held.sayUpTo(99);
    const client = async (cut: number) => {
      const head = await (await studio.follow(id)).take(cut);
      const rest = await studio.follow(id, cut);
      return { head, rest: rest.frames() };
    };
    const cutPoints = Array.from({ length: 199 }, (_, index) => index + 1).filter(
      (cut) => cut % rounds(3, 12) === 0,
    );
    const clients = cutPoints.map((cut) => client(cut));
    // These have left and are back before the second half is there.
    await Promise.all(clients.filter((_, index) => (cutPoints[index] ?? 0) < 100));
    await held.sayUpTo(198);
    const lines = (await first).map(({ data }) => data);
    expect(faultsOfStream(await first, id)).toEqual([]);
    expect(lines).toHaveLength(200);
    for (const parts of clients) {
      const { head, rest } = await parts;
      expect([...head, ...(await rest)].map(({ data }) => data)).toEqual(lines);
    }
  });

  it('of a finished run is replayed after a restart of the server and ends', async () => {
    const first = await server.startAnother();
    const client = first.studio;
    const body = { deployment_name: await client.deploy(echo()), query: 'before the restart' };
    const stream = await client.stream(body);
    const frames = await stream.frames();
    const lines = frames.map(({ data }) => data);
    await first.close();
    const second = await server.startAnother();
    try {
      const again = second.studio;
      const id = stream.executionId;
      for (const after of [undefined, 1, frames.length - 1]) {
        const rest = await again.follow(id, after, { signal: AbortSignal.timeout(HANG_MS) });
        expect((await rest.frames()).map(({ data }) => data)).toEqual(lines.slice(after));
      }
      expect((await again.follow(id, frames.length)).status).toBe(204);
      const headers = { 'Last-Event-ID': frames.at(-1)?.id ?? '' };
      expect((await again.stream(body, { headers })).status).toBe(204);
    } finally {
      await second.close();
    }
  });

  it('holds nothing of another run of the same deployment, and none of them ends another', async () => {
    const deployment = await studio.deploy(upstreamAgent());
    const markers = Array.from({ length: rounds(50, 12) }, (_, run) => `marker-${run}-end`);
    const runs = markers.map(async (marker) => {
      const words = Array.from({ length: 20 }, (_, index) => `${marker} ${index}\n`);
      const held = new HeldUpstream(words);
      holding.set(marker, held);
      const run = whole(deployment, marker);
      await Promise.race([held.sayUpTo(1), run]);
      return { marker, held, run, words };
    });
    // All of them run, and then they speak in turns.
    const running = await Promise.all(runs);
    for (let word = 2; word <= 20; word++) {
      await Promise.all(running.map(({ held, run }) => Promise.race([held.sayUpTo(word), run])));
    }
    const ids = new Set<string>();
    for (const { run, words, marker } of running) {
      const { id, frames } = await run;
      ids.add(id);
      expect(faultsOfStream(frames, id)).toEqual([]);
      expect(frames.at(-1)?.chunk.status).toBe('completed');
      expect(textOf(frames)).toBe(words.join(''));
      expect(new Set(JSON.stringify(frames).match(/marker-\d+-end/g))).toEqual(new Set([marker]));
    }
    expect(ids.size).toBe(markers.length);
  });
});

describe('hostile text', () => {
  const texts = [
    'a\r\nb\rc\nd',
    'line\u2028separator\u2029next\u0085line',
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
      const { id, frames, raw } = await whole(deployment, `hostile ${index}`);
      expect(faultsOfStream(frames, id)).toEqual([]);
      expect(frames).toHaveLength(4);
      expect(textOf(frames)).toBe(text + text);
      // Whatever a client takes for the end of a line.
      expect(raw.split(/\r\n|[\r\n\v\f\u0085\u2028\u2029]/)).toEqual(raw.split('\n'));
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
    const replayed = await (await studio.follow(id)).frames();
    expect(replayed.map(({ data }) => data)).toEqual(frames.map(({ data }) => data));
    const { body } = await studio.json<{ response: string }>(`/api/executions/${id}`);
    expect(body.response.toWellFormed()).toBe('a\ufffdb\ufffdc');
  });

  it('split in the middle of an emoji over two reads of the upstream arrives whole', async () => {
    const name = await studio.deploy(upstreamAgent());
    const { frames } = await whole(name, 'byte by byte');
    expect(textOf(frames)).toBe(FAMILY);
  });
});

it('leaves no stream open and nothing in the queue', async () => {
  for (const name of ['agent_studio_open_streams', 'agent_studio_queue_depth']) {
    await until(async () => (await studio.metric(name)) === 0);
  }
});

import type { ServerResponse } from 'node:http';
import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { fetchEventSource } from '@microsoft/fetch-event-source';
import { EventSource as EventSourcePackage } from 'eventsource';
import { EventSource as UndiciEventSource } from 'undici';
import { startTestApp } from '../support/app.js';
import type { TestApp } from '../support/app.js';
import { ChromiumPage, FETCH_EVENT_SOURCE, hasChromium } from '../support/chromium.js';
import { BrowserGlobals, runWithEventSource, runWithFetchEventSource } from '../support/sse-clients.js';
import type { Run } from '../support/sse-clients.js';
import { startSseProxy } from '../support/sse.js';
import type { SseProxy } from '../support/sse.js';
import { Studio, faultsOfStream, textOf, until, upstreamAgent } from '../support/studio.js';
import type { Frame } from '../support/studio.js';
import { Upstream, chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import type { UpstreamRequest } from '../support/upstream.js';

/** Before which byte of what a connection received it is cut, as soon as there is enough of it. */
type Cut = (received: Buffer) => number | undefined;

interface Client {
  name: string;
  run: (run: Run) => Promise<Frame[]>;
  cuts: Cut[];
  /** In what pieces its bytes arrive. */
  pieceSize?: number;
  missing?: string;
}

/** Where a connection breaks if it may be anywhere. */
const randomByte = 1 + Math.floor(Math.random() * 1000);
const EMOJI = Buffer.from('🌍');
/** What the model says during one connection: more than 1,000 bytes of stream. */
const PIECES = ['Grüße ', '🌍 ', '日本語 ', '"quoted"\n\n', 'data: \\ id: '];

const insideACharacter: Cut = (received) => after(received.indexOf(EMOJI), 2);
const beforeAnything: Cut = () => 0;
const betweenFrames: Cut = (received) => after(secondEndOf(received), 2);
const insideData: Cut = (received) => after(received.indexOf('"timestamp"', secondEndOf(received)), 5);
/** The last frame has come, but for the line that makes it count. */
const beforeTheEmptyLine: Cut = (received) => after(secondEndOf(received), 1);
const anywhere: Cut = (received) => (received.length >= randomByte ? randomByte : undefined);

const CUTS = [insideACharacter, beforeAnything, betweenFrames, insideData];
const WORST_CUTS = [...CUTS, beforeTheEmptyLine, anywhere];

const after = (index: number, bytes: number) => (index < 0 ? undefined : index + bytes);
const secondEndOf = (received: Buffer) => received.indexOf('\n\n', received.indexOf('\n\n') + 2);

let upstream: Upstream;
let app: TestApp;
let studio: Studio;
let page: ChromiumPage | undefined;
let browserGlobals: BrowserGlobals;
const proxies = new Set<SseProxy>();
/** How the model answers, by the query: in how many rounds, and what it waits for before each of them. */
const answers = new Map<string, { rounds: number; begins: (round: number) => Promise<unknown> }>();

beforeAll(async () => {
  browserGlobals = new BrowserGlobals();
  upstream = await Upstream.start((response, { body }) => {
    answer(response, queryOf(body)).catch(() => response.destroy());
  });
  const provider = { type: 'openai-compatible', base_url: upstream.url };
  app = await startTestApp({ MODEL_PROVIDERS: JSON.stringify({ upstream: provider }) });
  studio = new Studio(app.url);
  if (hasChromium) page = await ChromiumPage.open();
});
afterAll(async () => {
  await page?.close();
  await Promise.all([...proxies].map((proxy) => proxy.close()));
  await app?.close();
  await upstream?.stop();
  browserGlobals.remove();
});

function queryOf({ messages }: UpstreamRequest['body']): string {
  return (messages as { content: string }[]).at(-1)?.content ?? '';
}

/** Says {@link PIECES} in each round. */
async function answer(response: ServerResponse, query: string): Promise<void> {
  const { rounds = 1, begins } = answers.get(query) ?? {};
  for (let round = 1; round <= rounds; round++) {
    await begins?.(round);
    writeStream(response, ...PIECES.map((piece) => chatDelta(`${round} ${piece}`)));
  }
  writeStream(response, chatEnd());
  response.end();
}

/** What came of an execution that a client ran through a bad network. */
interface Outcome {
  frames: Frame[];
  executions: { execution_id: string; response: string }[];
  modelCalls: number;
  /** The answers that the client got, but for those to what a browser asks beforehand. */
  statuses: () => number[];
}

/** Has the model say something during each connection, so that none of them is only a replay. */
async function observe(
  run: Client['run'],
  {
    cuts,
    pieceSize,
    rounds = cuts.length + 1,
    stops = true,
  }: { cuts: Cut[]; pieceSize?: number; rounds?: number; stops?: boolean },
): Promise<Outcome> {
  const deployment_name = await studio.deploy(upstreamAgent());
  const query = `asked of ${deployment_name}`;
  const cutAt = (stream: number, received: Buffer) => cuts[stream]?.(received);
  const proxy = await startSseProxy(app.url, { cutAt, pieceSize });
  proxies.add(proxy);
  answers.set(query, { rounds, begins: (round) => until(() => proxy.streams.length >= round) });

  const frames = await run({ server: proxy.url, request: { deployment_name, query }, stops });
  const { body } = await studio.json<{ items: Outcome['executions'] }>(
    `/api/executions?deployment_name=${deployment_name}`,
  );
  const calls = upstream.requests.filter((request) => queryOf(request.body) === query);
  const asked = () =>
    proxy.answers.filter(({ method, path }) => method !== 'OPTIONS' && path.endsWith('/stream'));
  return {
    frames,
    executions: body.items,
    modelCalls: calls.length,
    statuses: () => asked().map(({ status }) => status),
  };
}

/** Every chunk once and in order, from one execution that called its model once. */
function expectWhole({ frames, executions, modelCalls }: Outcome): void {
  const [execution] = executions;
  const faults = faultsOfStream(frames, execution?.execution_id ?? '');
  expect({ randomByte, faults, executions: executions.length, modelCalls }).toEqual({
    randomByte,
    faults: [],
    executions: 1,
    modelCalls: 1,
  });
  expect(textOf(frames)).toBe(execution?.response);
}

function chromium(): ChromiumPage {
  if (!page) throw new Error('Chromium is not installed.');
  return page;
}

const EVENT_SOURCES: Client[] = [
  {
    name: "undici's EventSource",
    cuts: WORST_CUTS,
    pieceSize: 7,
    run: (run) => runWithEventSource(UndiciEventSource, run),
  },
  {
    name: 'the EventSource of npm',
    cuts: WORST_CUTS,
    pieceSize: 7,
    run: (run) => runWithEventSource(EventSourcePackage, run),
  },
  {
    name: "Chromium's EventSource",
    cuts: WORST_CUTS,
    pieceSize: 7,
    run: (run) => chromium().call(runWithEventSource, 'EventSource', run),
    missing: hasChromium ? undefined : 'chromium',
  },
];

const POST_REPEATERS: Client[] = [
  // It takes an event for received at its id line, and so loses it if the connection breaks before the next line. A client
  // can avoid that as the next one does.
  { name: 'fetch-event-source', cuts: CUTS, run: (run) => runWithFetchEventSource(fetchEventSource, run) },
  {
    name: 'fetch-event-source that asks for what follows the last event it delivered',
    cuts: WORST_CUTS,
    pieceSize: 7,
    run: (run) => runWithFetchEventSource(fetchEventSource, { ...run, counts: true }),
  },
  // When a connection breaks, a browser drops what the page has not read yet (Streams standard, ReadableStreamError): perhaps
  // all of it, and with it the execution's id. Then only a key keeps the POST from running again.
  {
    name: 'fetch-event-source in Chromium',
    cuts: CUTS,
    run: (run) =>
      chromium().call(runWithFetchEventSource, FETCH_EVENT_SOURCE, {
        ...run,
        headers: { 'Idempotency-Key': run.request.query },
      }),
    missing: hasChromium ? undefined : 'chromium',
  },
];

describe('over a network that breaks', () => {
  for (const { name, cuts, pieceSize, run, missing } of [...EVENT_SOURCES, ...POST_REPEATERS]) {
    // What is missing fails in CI, where all of it is installed.
    const isSkipped = missing !== undefined && !process.env['CI'];
    if (isSkipped) console.warn(`${name} is not tested, because ${missing} is not installed.`);
    // They mostly wait, so all of them do it at the same time.
    const test = isSkipped ? it.skip : it.concurrent;

    test(`${name} gets every chunk once, and stops at the terminal one`, async () => {
      const outcome = await observe(run, { cuts, pieceSize });
      expectWhole(outcome);
      expect(outcome.statuses()).toEqual(Array.from({ length: cuts.length + 1 }, () => 200));
    });

    test(`${name} that does not stop by itself is told to by 204, and does not come again`, async () => {
      const ended = await observe(run, { cuts: [], stops: false });
      expectWhole(ended);
      expect(ended.statuses()).toEqual([200, 204]);
      // Takes two reconnects, so that the first one had time for another.
      const later = await observe(run, { cuts: [betweenFrames], stops: false });
      expectWhole(later);
      expect(later.statuses()).toEqual([200, 200, 204]);
      expect(ended.statuses()).toEqual([200, 204]);
    });
  }
});

describe('fetch-event-source', () => {
  it('with an Idempotency-Key runs once though the connection breaks before it has an id', async () => {
    const headers = { 'Idempotency-Key': `key ${Date.now()}` };
    const run: Client['run'] = (one) => runWithFetchEventSource(fetchEventSource, { ...one, headers });
    const outcome = await observe(run, { cuts: [beforeAnything, beforeAnything, betweenFrames] });
    expectWhole(outcome);
    expect(outcome.statuses()).toEqual([200, 200, 200, 200]);
  });

  it('goes on with the same execution when its page was hidden and is shown again', async () => {
    const hide = () => {
      browserGlobals.setHidden(true);
      setImmediate(() => browserGlobals.setHidden(false));
    };
    const delivered = (count: number) => void (count === 3 && setImmediate(hide));
    const run: Client['run'] = (one) =>
      runWithFetchEventSource(fetchEventSource, { ...one, counts: true, delivered });
    const outcome = await observe(run, { cuts: [], rounds: 2 });
    expectWhole(outcome);
    expect(outcome.statuses()).toEqual([200, 200]);
  });
});

import { once } from 'node:events';
import { mkdtemp, readdir, rm } from 'node:fs/promises';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from '@jest/globals';
import { startTestApp } from '../support/app.js';
import type { TestApp } from '../support/app.js';
import { serversBelow } from '../support/server-processes.js';
import { runProgram, startSseProxy } from '../support/sse.js';
import type { ForwardedRequest, StreamFault } from '../support/sse.js';

const repository = join(import.meta.dirname, '../..');
const verify = (url: string, ...options: string[]) =>
  runProgram([process.execPath, join(repository, 'scripts/verify.mjs'), '--url', url, ...options]);

describe('npm run verify', () => {
  let app: TestApp;
  beforeAll(async () => {
    app = await startTestApp();
  });
  afterAll(() => app.close());

  /** Its own, of every run, are gone. */
  async function expectNothingLeft(): Promise<void> {
    for (const path of ['/api/workflows', '/api/workflows/deployments/active']) {
      expect(await (await fetch(app.url + path)).json()).toEqual([]);
    }
  }

  it('finds nothing wrong with the server', async () => {
    const { code, stdout, stderr } = await verify(app.url);

    expect(stdout).not.toContain('FAILED');
    expect(stdout).toMatch(/\n\d\d held, 0 failed\n$/);
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
    await expectNothingLeft();
  });

  const order = '`started` is first, one terminal chunk is last, and the numbers have no gap';
  const framing = 'each event has an id and one line of data, ends with LF and a blank line';
  const fields = 'each chunk has the documented fields and no other';
  const headers = 'a streamed run answers with an uncompressed, unbuffered event stream';
  const text = 'the chunks together are, byte for byte, the answer of the execution and of its agent';

  it.each<[string, string, StreamFault]>([
    ['loses a chunk', order, { rewrite: blocks((all) => all.toSpliced(4, 1)) }],
    ['repeats a chunk', order, { rewrite: blocks((all) => all.toSpliced(4, 0, all[4] ?? '')) }],
    [
      'swaps two chunks',
      order,
      { rewrite: blocks((all) => [...all.slice(0, 3), ...all.slice(3, 5).reverse(), ...all.slice(5)]) },
    ],
    ['ends without a terminal chunk', order, { rewrite: blocks((all) => all.slice(0, -1)) }],
    ['ends its lines with CR LF', framing, { rewrite: (stream) => stream.replaceAll('\n', '\r\n') }],
    ['leaves out the last blank line', framing, { rewrite: (stream) => stream.slice(0, -1) }],
    [
      'names its events',
      framing,
      { rewrite: (stream) => stream.replaceAll('data: ', 'event: message\ndata: ') },
    ],
    [
      'sends retry by itself',
      framing,
      { rewrite: (stream) => stream.replace(/retry: (.*)\n/, 'retry: $1\n\n') },
    ],
    [
      'adds a field',
      fields,
      { rewrite: (stream) => stream.replaceAll('"type":"content"', '"type":"content","delta":"x"') },
    ],
    [
      'tells the time without milliseconds',
      fields,
      { rewrite: (stream) => stream.replaceAll(/\.\d{3}Z/g, 'Z') },
    ],
    ['changes the text', text, { rewrite: (stream) => stream.replaceAll('offline', 'of fline') }],
    ['allows a cache to transform', headers, { headers: { 'cache-control': 'no-cache' } }],
    ['may be buffered by nginx', headers, { headers: { 'x-accel-buffering': 'yes' } }],
  ])('notices a server that %s', (_fault, promise, fault) => expectNoticed('streams', [promise], fault));

  const runsOnce = 'the same key and body get the same execution in all three ways, and it runs once';
  const reused = 'another body with that key is refused with 422, and runs nothing';
  const badKey = 'a key that is empty, too long or no plain text is refused with 400, and runs nothing';
  const repeated = 'a POST repeated with Last-Event-ID goes on with the same bytes, and runs nothing';
  const nothingMore = 'a POST repeated after the last event is answered with 204, and runs nothing';
  const otherQuery =
    'a POST with the last event of another query, or with no such event, runs nothing: 400 or 404';
  const cancelled = 'a cancellation that races the end is kept or refused, never acknowledged and ignored';
  const snapshot = 'the status stream of a deployment begins with a snapshot';
  const changes = 'a status stream tells each change once and in order, under numbers that ascend';
  const missed = 'a status stream goes on after any event, with the same bytes and no snapshot';
  const badCursor = 'a status cursor that is no number is refused with 400, an unknown deployment with 404';
  const merged =
    'a batch streams all its items as one: each whole and in order, between the two chunks of the batch';
  const mergedResumed = "a batch's stream goes on after any event, with the same bytes, and runs nothing";
  const mergedEnd =
    "after a batch's last event there is nothing more: 204; a cursor that is none of it is refused";
  const batchRepeated = 'a batch that is sent again with its key is the same batch, and runs nothing';
  const batchCancelled = 'a cancelled batch ends with all of its items, and none is lost';

  it.each<[string, string, string[], StreamFault]>([
    [
      'pays no heed to the key',
      'streams,batches',
      [runsOnce, reused, badKey, batchRepeated],
      { request: without('idempotency-key') },
    ],
    [
      'pays no heed to the last event',
      'streams,status,batches',
      [repeated, nothingMore, otherQuery, missed, badCursor, mergedResumed, mergedEnd],
      { request: without('last-event-id') },
    ],
    [
      'changes the text on a WebSocket',
      'websocket',
      ['a run over a WebSocket has the chunks of its event stream, byte for byte'],
      {
        rewriteWebSocket: (bytes) =>
          Buffer.from(bytes.toString('latin1').replaceAll('offline', 'oFFline'), 'latin1'),
      },
    ],
    [
      'refuses otherwise on a WebSocket',
      'websocket',
      ['what a WebSocket refuses has the code and the status that it has over HTTP'],
      {
        rewriteWebSocket: (bytes) =>
          Buffer.from(
            bytes
              .toString('latin1')
              .replaceAll('"code":"execution_not_found"', '"code":"executiOn_not_found"'),
            'latin1',
          ),
      },
    ],
    [
      'ignores a cancellation',
      'executions,batches',
      [cancelled, batchCancelled],
      { request: ignoreCancellation },
    ],
    ['swaps two chunks of an item in a batch', 'batches', [merged], { rewrite: swapInItem }],
    [
      'counts wrongly at the end of a batch',
      'batches',
      [merged],
      { rewrite: (stream) => stream.replace('"completed":3', '"completed":2') },
    ],
    [
      'ends a batch where an item ends',
      'batches',
      [merged],
      { rewrite: blocks((all) => all.slice(0, all.findIndex(endsItem) + 1 || undefined)) },
    ],
    [
      'counts wrongly in its snapshot',
      'status',
      [snapshot],
      { rewriteStatus: (text) => text.replace('"queued":0', '"queued":1') },
    ],
    [
      'tells a change twice',
      'status',
      [changes],
      { rewriteStatus: blocks((all) => all.flatMap((block) => (isRunning(block) ? [block, block] : block))) },
    ],
    [
      'does not tell a change',
      'status',
      [changes],
      { rewriteStatus: blocks((all) => all.filter((block) => !isRunning(block))) },
    ],
    [
      'numbers its changes backwards',
      'status',
      [changes],
      { rewriteStatus: (text) => text.replaceAll(/^id: |(?<="sequence":)/gm, '$&-') },
    ],
  ])('notices a server that %s', (_fault, parts, promises, fault) => expectNoticed(parts, promises, fault));

  async function expectNoticed(parts: string, promises: string[], fault: StreamFault): Promise<void> {
    const proxy = await startSseProxy(app.url, fault);
    try {
      const { code, stdout } = await verify(proxy.url, '--only', parts);

      for (const promise of promises) expect(stdout).toContain(`FAILED  ${promise}\n`);
      expect(stdout).toMatch(/\n\d+ held, [1-9]\d* failed\n$/);
      expect(code).toBe(1);
    } finally {
      await proxy.close();
    }
    await expectNothingLeft();
  }

  it('names the parts that can be asked for where there is none of that name', async () => {
    const { code, stderr } = await verify(app.url, '--only', 'streams,all');
    expect(stderr).toContain('There is no part "all" to check.');
    expect(stderr).toContain('[--only refusals,streams,');
    expect(code).toBe(1);
  });

  it('says how to go on where there is no server', async () => {
    const server = createServer().listen(0, '127.0.0.1');
    await once(server, 'listening');
    const { port } = server.address() as AddressInfo;
    server.close();
    await once(server, 'close');

    const { code, stderr } = await verify(`http://127.0.0.1:${port}`);

    expect(stderr).toContain(`No answer from http://127.0.0.1:${port} (ECONNREFUSED).`);
    expect(stderr).toContain('npm start');
    expect(code).toBe(1);
  });
});

describe('npm run demo', () => {
  let folder: string;
  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'agent-studio-test-'));
  });
  afterEach(() => rm(folder, { recursive: true, force: true }));

  const demo = (onOutput?: (stdout: string, pid: number) => void) => {
    const env = { TMPDIR: folder, MODEL_PROVIDERS: '', LOG_LEVEL: '' };
    return runProgram([process.execPath, join(repository, 'scripts/demo.mjs')], { env, onOutput });
  };

  async function expectNothingLeft(stdout: string): Promise<void> {
    expect((await readdir(folder)).filter((name) => name.startsWith('agent-studio-demo-'))).toEqual([]);
    expect(serversBelow(folder)).toEqual([]);
    const [url] = /http:\/\/127\.0\.0\.1:\d+/.exec(stdout) ?? ['none'];
    await expect(fetch(url)).rejects.toThrow('fetch failed');
  }

  it('shows the stream, the steps, a resumption, the statistics and an error, and leaves nothing behind', async () => {
    const { code, stdout, stderr } = await demo();

    expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
    expect(stdout).toMatch(/\n +#1 +\d+ ms {2}started\n +#2 +\d+ ms {2}This is the built-in offline model/);
    const last = /#(\d+) +\d+ ms {2}completed\n/.exec(stdout)?.[1];
    expect(stdout).toMatch(new RegExp(`goes on with #\\d+ and ends with #${last}: .*none lost, none twice`));
    expect(stdout).toMatch(/editor +completed +\d+ ms/);
    expect(stdout).toContain('executions        2, of which 2 succeeded; error rate 0 %');
    expect(stdout).toContain('404 deployment_not_found: There is no deployment "no-such-desk".');
    expect(stdout).not.toContain('\u001b'); // it is no terminal
    await expectNothingLeft(stdout);
  });

  it('leaves nothing behind when it is interrupted', async () => {
    let isInterrupted = false;
    const { code, stdout, stderr } = await demo((output, pid) => {
      if (isInterrupted || !output.includes('ready after')) return;
      isInterrupted = true;
      process.kill(pid, 'SIGINT');
    });

    expect(stderr).toContain('Stopped by SIGINT.');
    expect(stdout).not.toContain('Done.');
    expect(code).toBe(1);
    await expectNothingLeft(stdout);
  });
});

/** Changes the list of a stream's events. */
function blocks(change: (blocks: string[]) => string[]): (stream: string) => string {
  return (stream) => {
    const all = stream.replace(/^\n/, '').split('\n\n').slice(0, -1);
    return change(all)
      .map((block) => `${block}\n\n`)
      .join('');
  };
}

/** Changes the order of two chunks under ids that are in order. */
function swapInItem(stream: string): string {
  if (!stream.includes('"batch_id"')) return stream;
  const itemOf = (block = '') =>
    /"item_id":"[^"]*","sequence":[2-9]\d*,"agent_id"/.test(block) && /"item_id":"[^"]*"/.exec(block)?.[0];
  return blocks((all) => {
    const at = all.findIndex((block, index) => itemOf(block) && itemOf(block) === itemOf(all[index + 1]));
    const data = (index: number) => /^data: .*$/m.exec(all[index] ?? '')?.[0] ?? '';
    const swapped = (from: number, to: number) => all[from]?.replace(data(from), () => data(to)) ?? '';
    return all.toSpliced(at, 2, swapped(at, at + 1), swapped(at + 1, at));
  })(stream);
}

const endsItem = (block: string) => /"status":"completed",.*"item_id"/.test(block);

const isRunning = (block: string) => block.includes('"status":"running"');

function without(header: string): (request: ForwardedRequest) => void {
  return ({ headers }) => {
    delete headers[header];
  };
}

/** Answers with the execution, and does nothing else. */
function ignoreCancellation(request: ForwardedRequest): void {
  if (!request.path.endsWith('/cancel')) return;
  request.method = 'GET';
  request.path = request.path.slice(0, -'/cancel'.length);
}

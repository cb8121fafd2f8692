import { spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { createServer } from 'node:http';
import type { Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { chromium } from 'playwright-core';
import type { Browser } from 'playwright-core';
import { startTestApp } from '../support/app.js';
import type { TestApp } from '../support/app.js';
import { runProgram, startSseProxy } from '../support/sse.js';

/** What a client showed of an execution. */
interface Outcome {
  text: string;
  /** What it said about the end, or why there was none. */
  status: string;
  succeeded: boolean;
  /** How often it connected again, where it says so. */
  reconnects?: string | null;
}

interface Request {
  server: string;
  deployment?: string;
  query?: string;
}

interface Example {
  name: string;
  run: (request: Request) => Promise<Outcome>;
  /** What must be installed to run it, if it is not. */
  missing?: string;
}

const folder = join(import.meta.dirname, '../../examples');
const CHROMIUM = '/usr/bin/chromium';

/** Characters of every width, line ends, and what shells, JSON and HTML escape. */
const QUERY = 'Grüße 🌍\u2028 "quoted" \\ \\n %s <b>&amp;\n\ttwo  spaces, end.';
/** Ends inside the first character of four bytes. */
const HALF_AN_EMOJI = Buffer.from('🌍').subarray(0, 2);

let app: TestApp;
let scripted: Server;
let batchScripted: Server;
let browser: Browser | undefined;

beforeAll(async () => {
  app = await startTestApp({ SEED_EXAMPLE: 'true' });
  scripted = await startScripted(SCRIPT);
  batchScripted = await startScripted(BATCH_SCRIPT);
  const args = ['--no-sandbox', '--disable-background-networking', '--disable-gpu'];
  if (existsSync(CHROMIUM)) browser = await chromium.launch({ executablePath: CHROMIUM, args });
});
afterAll(async () => {
  await browser?.close();
  for (const server of [scripted, batchScripted]) {
    server.closeAllConnections();
    server.close();
  }
  await app.close();
});

/** A server that answers everything with the same stream. */
async function startScripted(stream: string): Promise<Server> {
  const server = createServer((_request, response) => {
    for (const name of ['origin', 'headers']) response.setHeader(`access-control-allow-${name}`, '*');
    response.setHeader('access-control-expose-headers', '*');
    response.setHeader('location', '/api/executions/x/stream');
    response.setHeader('content-type', 'text/event-stream');
    response.end(stream);
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return server;
}

function program(name: string, command: string[], missing?: string): Example {
  return {
    name,
    missing,
    run: async ({ server, deployment = 'support-desk', query = QUERY }) => {
      const arguments_ = [...command, join(folder, name), query, deployment, server];
      const { code, stdout, stderr } = await runProgram(arguments_);
      return { text: stdout.replace(/\n$/, ''), status: stderr, succeeded: code === 0 };
    },
  };
}

async function runInBrowser({
  server,
  deployment = 'support-desk',
  query = QUERY,
}: Request): Promise<Outcome> {
  if (!browser) throw new Error(`${CHROMIUM} does not run`);
  const page = await browser.newPage();
  try {
    const address = pathToFileURL(join(folder, 'browser.html'));
    address.search = new URLSearchParams({ server, deployment }).toString();
    await page.goto(address.href);
    await page.locator('[name=query]').fill(query);
    await page.locator('button').click();
    await page.locator('button:enabled').waitFor();
    const read = (id: string) => page.locator(id).textContent();
    const [text, status] = [(await read('#answer')) ?? '', (await read('#status')) ?? ''];
    return { text, status, succeeded: status === 'completed', reconnects: await read('#reconnects') };
  } finally {
    await page.close();
  }
}

const pythonWithRequests = ['python3', '/usr/bin/python3'].find(
  (python) => spawnSync(python, ['-c', 'import requests']).status === 0,
);

const EXAMPLES: Example[] = [
  program('curl.sh', ['bash']),
  program('python_stdlib.py', ['python3']),
  program(
    'python_requests.py',
    [pythonWithRequests ?? 'python3'],
    pythonWithRequests ? undefined : 'python3-requests',
  ),
  program('node.mjs', [process.execPath]),
  { name: 'browser.html', run: runInBrowser, missing: existsSync(CHROMIUM) ? undefined : 'chromium' },
];

describe.each(EXAMPLES)('examples/$name', ({ name, run, missing }) => {
  // What is missing fails in CI, where all of it is installed.
  const isSkipped = missing !== undefined && !process.env['CI'];
  if (isSkipped) console.warn(`examples/${name} is not tested, because ${missing} is not installed.`);
  const test = isSkipped ? it.skip : it;

  test('gets the text whole though the connection breaks inside a character and before an answer', async () => {
    const proxy = await startSseProxy(app.url, {
      pieceSize: 7,
      cutAt: (stream, received) => {
        if (stream === 1) return 0;
        const index = received.indexOf(HALF_AN_EMOJI);
        return stream === 0 && index >= 0 ? index + HALF_AN_EMOJI.length : undefined;
      },
    });
    try {
      const { text, status, succeeded, reconnects = '2' } = await run({ server: proxy.url });

      const [execution] = await listExecutions();
      expect(text).toBe(execution?.response);
      expect(text).toContain(QUERY);
      expect({ status, succeeded, reconnects }).toMatchObject({ succeeded: true, reconnects: '2' });
      const [first, second, third, ...more] = proxy.streams;
      expect(first?.path).toBe('/api/workflows/execute/stream');
      expect(second?.lastEventId).toMatch(/^[0-9a-f-]{36}:\d\d$/);
      expect(third).toEqual(second);
      expect(more).toEqual([]);
    } finally {
      await proxy.close();
    }
  });

  test('runs once though the connection breaks before the answers to its first requests come', async () => {
    // Chromium repeats a request by itself where a connection that it used before breaks; here it has to do it twice.
    const proxy = await startSseProxy(app.url, { losesHeaders: (stream) => stream < 2 });
    const before = (await listExecutions()).map(({ execution_id }) => execution_id);
    try {
      const { text, status, succeeded } = await run({ server: proxy.url });

      const [execution, ...others] = await listExecutions();
      expect(others.map(({ execution_id }) => execution_id)).toEqual(before);
      expect(text).toBe(execution?.response);
      expect(text).toContain(QUERY);
      expect({ status, succeeded }).toMatchObject({ succeeded: true });
      const [first, ...repeated] = proxy.streams;
      expect(first?.path).toBe('/api/workflows/execute/stream');
      expect(first?.idempotencyKey).toMatch(/^[0-9a-f-]{24,}$/);
      expect(repeated).toEqual([first, first]);
    } finally {
      await proxy.close();
    }
  });

  test('does not show twice what an agent said before it began again, and fails as its execution does', async () => {
    const { port } = scripted.address() as AddressInfo;
    const { text, status, succeeded } = await run({ server: `http://127.0.0.1:${port}` });

    // A terminal can't take back what it showed; the shell script only says what is void.
    if (name === 'browser.html') expect(text).toBe('kept new');
    else if (name !== 'curl.sh') expect(text).toBe('kept void\n[started again]\nkept new');
    expect(status).toContain('The model is "gone".');
    expect(succeeded).toBe(false);
  });

  test('says what is wrong with the deployment', async () => {
    const { text, status, succeeded } = await run({ server: app.url, deployment: 'unknown-desk' });

    expect(status).toContain('There is no deployment');
    expect({ text, succeeded }).toEqual({ text: '', succeeded: false });
  });
});

describe('examples/batch.mjs', () => {
  const QUERIES = ['one', QUERY, 'three'];
  const runBatch = (server: string, { deployment = 'support-desk' } = {}) =>
    runProgram([process.execPath, join(folder, 'batch.mjs'), ...QUERIES], {
      env: { SERVER: server, DEPLOYMENT: deployment },
    });
  /** What it is to print of the executions, in whatever order they end. */
  const blocksOf = (stdout: string) => stdout.split(/^(?=--- query-)/m).toSorted();
  const shown = (executions: BatchItem[]) =>
    executions.map(({ item_id, response }) => `--- ${item_id}: completed\n${response}\n`).toSorted();

  it('gets all answers whole though the connection breaks inside a character and before an answer', async () => {
    const proxy = await startSseProxy(app.url, {
      pieceSize: 7,
      cutAt: (stream, received) => {
        if (stream === 1) return 0;
        const index = received.indexOf(HALF_AN_EMOJI);
        return stream === 0 && index >= 0 ? index + HALF_AN_EMOJI.length : undefined;
      },
    });
    try {
      const { code, stdout, stderr } = await runBatch(proxy.url);

      const items = await newestBatch();
      expect(items).toHaveLength(QUERIES.length);
      expect(blocksOf(stdout)).toEqual(shown(items));
      expect(stdout).toContain(QUERY);
      expect(stderr).toMatch(/"total":3,.*"completed":3/);
      expect(code).toBe(0);
      const [first, second, third, ...more] = proxy.streams;
      expect(first?.path).toBe('/api/workflows/execute/batch/stream');
      expect(second?.lastEventId).toMatch(/^[0-9a-f-]{36}:\d+$/);
      expect(third).toEqual(second);
      expect(more).toEqual([]);
    } finally {
      await proxy.close();
    }
  });

  it('runs once though the connection breaks before the answers to its first requests come', async () => {
    const proxy = await startSseProxy(app.url, { losesHeaders: (stream) => stream < 2 });
    const before = (await listExecutions()).length;
    try {
      const { code, stdout } = await runBatch(proxy.url);

      expect((await listExecutions()).length - before).toBe(QUERIES.length);
      expect(blocksOf(stdout)).toEqual(shown(await newestBatch()));
      expect(code).toBe(0);
      const [first, ...repeated] = proxy.streams;
      expect(first?.idempotencyKey).toMatch(/^[0-9a-f-]{36}$/);
      expect(repeated).toEqual([first, first]);
    } finally {
      await proxy.close();
    }
  });

  it('does not show what an item said before it began again, and fails if one of its items did', async () => {
    const { port } = batchScripted.address() as AddressInfo;
    const { code, stdout, stderr } = await runBatch(`http://127.0.0.1:${port}`);

    expect(stdout).toBe('--- y: completed\nvoid\n--- x: error\nkept new\n');
    expect(stderr).toContain('[x: The model is "gone".]');
    expect(code).toBe(1);
  });

  it('says what is wrong with the deployment', async () => {
    const { code, stdout, stderr } = await runBatch(app.url, { deployment: 'unknown-desk' });

    expect(stderr).toContain('There is no deployment');
    expect({ code, stdout }).toEqual({ code: 1, stdout: '' });
  });
});

const COUNTS = { total: 2, queued: 0, running: 0, completed: 1, error: 1, cancelled: 0 };

const BATCH_SCRIPT = scriptOf([
  { type: 'status', status: 'started', data: { items: [] } },
  { type: 'status', status: 'started', item_id: 'x', sequence: 1 },
  { type: 'content', data: 'kept ', item_id: 'x', agent_id: 'a', sequence: 2 },
  { type: 'content', data: 'void', item_id: 'y', agent_id: 'b', sequence: 3 },
  { type: 'content', data: 'void', item_id: 'x', agent_id: 'b', sequence: 3 },
  { type: 'status', status: 'restarted', item_id: 'x', agent_id: 'b', discard_after: 1, sequence: 4 },
  { type: 'status', status: 'completed', item_id: 'y', sequence: 4 },
  { type: 'content', data: 'new', item_id: 'x', agent_id: 'b', sequence: 5 },
  { type: 'status', status: 'error', item_id: 'x', error: 'The model is "gone".', sequence: 6 },
  { type: 'status', status: 'completed', data: { counts: COUNTS } },
]);

const SCRIPT = scriptOf([
  { type: 'status', status: 'started' },
  { type: 'content', data: 'kept ', agent_id: 'a' },
  { type: 'content', data: 'void', agent_id: 'b' },
  { type: 'status', status: 'restarted', agent_id: 'b', discard_after: 1 },
  { type: 'content', data: 'new', agent_id: 'b' },
  { type: 'status', status: 'error', error: 'The model is "gone".', code: 'model_error' },
]);

function scriptOf(chunks: object[]): string {
  return chunks
    .map((chunk, index) => {
      const data = JSON.stringify({ sequence: index + 1, ...chunk });
      return `id: x:${index + 1}\ndata: ${data}\n\n`;
    })
    .join('');
}

interface BatchItem {
  execution_id: string;
  response: string;
  batch_id?: string;
  item_id?: string;
}

async function listExecutions(filter = ''): Promise<BatchItem[]> {
  const answer = await fetch(`${app.url}/api/executions${filter}`);
  return ((await answer.json()) as { items: BatchItem[] }).items;
}

async function newestBatch(): Promise<BatchItem[]> {
  const [newest] = await listExecutions();
  return listExecutions(`?batch_id=${newest?.batch_id}`);
}

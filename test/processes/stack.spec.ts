import { spawn } from 'node:child_process';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { mkdtemp, rm } from 'node:fs/promises';
import type { ServerResponse } from 'node:http';
import { createServer } from 'node:net';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from '@jest/globals';
import { findNginx } from '../../scripts/stack/nginx.mjs';
import { Stack } from '../../scripts/stack/stack.mjs';
import type { StackProcess } from '../../scripts/stack/stack-process.mjs';
import { createTestDatabase } from '../support/database.js';
import type { TestDatabase } from '../support/database.js';
import { processesBelow } from '../support/server-processes.js';
import { Studio, faultsOfStream, textOf, until, untilPasses, upstreamAgent } from '../support/studio.js';
import type { Frame } from '../support/studio.js';
import { Upstream, chatDelta, chatEnd, writeStream } from '../support/upstream.js';

const SCRIPT = resolve(import.meta.dirname, '../../scripts/stack.mjs');
const START_TIMEOUT_MS = 120_000;

/** What an array of the stack holds at a place. */
function at(processes: StackProcess[], index: number): StackProcess {
  const process = processes[index];
  if (!process) throw new Error(`There is no process ${index}.`);
  return process;
}

// What is missing fails in CI, where all of it is installed.
const isSkipped = findNginx() === undefined && !process.env['CI'];
if (isSkipped) console.warn('The system behind nginx is not tested, because nginx is not installed.');
const suite = isSkipped ? describe.skip : describe;

suite('a system of two api processes and two workers behind nginx', () => {
  /** The answers that the model owes, by the query: the tests write them. */
  const answers = new Map<string, ServerResponse>();
  let upstream: Upstream;
  let database: TestDatabase;
  let stack: Stack;
  let studio: Studio;
  let deployment_name: string;

  beforeAll(async () => {
    upstream = await Upstream.start((response, { body }) => {
      const messages = body.messages as { content: string }[];
      answers.set(messages.at(-1)?.content ?? '', response);
    });
    database = await createTestDatabase();
    const provider = { type: 'openai-compatible', base_url: upstream.url };
    stack = await Stack.start({
      databaseUrl: database.url,
      // No heartbeat may be what makes a stream move, or what ends it.
      env: { MODEL_PROVIDERS: JSON.stringify({ upstream: provider }), HEARTBEAT_INTERVAL_MS: '3600000' },
    });
    studio = new Studio(stack.url);
    deployment_name = await studio.deploy(upstreamAgent());
  }, START_TIMEOUT_MS);

  afterAll(async () => {
    await stack?.stop();
    await database?.drop();
    await upstream?.stop();
  });

  const answerTo = (query: string) => until(() => answers.get(query));

  function finish(answer: ServerResponse): void {
    writeStream(answer, chatEnd());
    answer.end();
  }

  it('passes each chunk on before the next one exists', async () => {
    const stream = await studio.stream({ deployment_name, query: 'lock-step' });
    const reader = stream[Symbol.asyncIterator]();
    const frames: Frame[] = [];
    const next = async () => {
      const { value } = (await reader.next()) as { value: Frame };
      frames.push(value);
      return value.chunk;
    };
    expect(await next()).toMatchObject({ status: 'started' });
    const model = await answerTo('lock-step');
    for (let word = 0; word < 10; word++) {
      writeStream(model, chatDelta(`${word} `));
      expect(await next()).toMatchObject({ data: `${word} ` });
    }
    finish(model);
    for await (const frame of reader) frames.push(frame);
    expect(faultsOfStream(frames, stream.executionId)).toEqual([]);
  });

  it('lets the server know when a client leaves', async () => {
    const leaving = new AbortController();
    const stream = await studio.stream({ deployment_name, query: 'leaving' }, { signal: leaving.signal });
    const openStreams = (count: number) => until(async () => (await openStreamsOf(stack)) === count);
    await openStreams(1);
    leaving.abort();
    await openStreams(0);
    finish(await answerTo('leaving'));
    const frames = await (await studio.follow(stream.executionId)).frames();
    expect(faultsOfStream(frames, stream.executionId)).toEqual([]);
  });

  it('starts a killed worker again on its port, while the other one goes on with what it ran', async () => {
    const stream = await studio.stream({ deployment_name, query: 'killed' });
    const frames = stream.frames();
    await answerTo('killed');
    answers.delete('killed');
    const [busy, index] = await until(async () => {
      const running = await Promise.all(stack.workers.map(({ url }) => runningAt(url)));
      const found = running.indexOf(1);
      return found < 0 ? undefined : ([at(stack.workers, found), found] as const);
    });
    const { pid, url, exited } = busy;
    busy.kill('SIGKILL');
    expect(await exited).toMatchObject({ signal: 'SIGKILL' });

    const again = await answerTo('killed');
    writeStream(again, chatDelta('taken over'));
    finish(again);
    const all = await frames;
    expect(faultsOfStream(all, stream.executionId)).toEqual([]);
    expect(textOf(all)).toBe('taken over');

    await until(() => busy.starts === 2);
    await busy.start(); // waits for that start
    expect(busy.pid).not.toBe(pid);
    expect(at(stack.workers, index)).toMatchObject({ url, starts: 2 });
    expect((await fetch(`${url}/health/live`)).status).toBe(200);
  });

  it('answers every request, POSTs too, while the api processes are restarted one after the other', async () => {
    for (const api of [...stack.apis, ...stack.apis]) {
      let isBack = false;
      const restarted = api.restart().then(() => (isBack = true));
      while (!isBack) {
        const refused = await studio.json('/api/workflows', { method: 'POST', body: {} });
        const read = await studio.json('/api/executions?limit=1');
        expect([refused.status, read.status]).toEqual([400, 200]);
      }
      await restarted;
    }
  });

  it('says so when another program has taken the port of a process meanwhile', async () => {
    const worker = at(stack.workers, 1);
    await worker.stop();
    const other = createServer().listen(worker.port, '127.0.0.1');
    await once(other, 'listening');
    try {
      await expect(worker.start()).rejects.toThrow(
        `The port ${worker.port} of 127.0.0.1, meant for worker-2`,
      );
    } finally {
      other.close();
      await once(other, 'close');
      await worker.start();
    }
  });

  it('never sends a POST again that an api process had received when it died', async () => {
    const own = await studio.deploy(upstreamAgent());
    const accepted = () => Promise.all(stack.apis.map(({ url }) => acceptedAt(url)));
    const before = await accepted();
    const waiting = studio.execute<{ code: string }>({ deployment_name: own, query: 'once' });
    const model = await answerTo('once');
    const index = (await accepted()).findIndex((count, place) => count !== before[place]);
    const api = at(stack.apis, index);
    const { exited } = api;
    api.kill('SIGKILL');
    await exited;

    const { status, body } = await waiting;
    expect({ status, code: body.code }).toEqual({ status: 503, code: 'unavailable' });
    const list = await studio.json<{ items: object[] }>(`/api/executions?deployment_name=${own}`);
    expect(list.body.items).toHaveLength(1);
    finish(model);
    await api.start();
  });

  it('says so in a problem document when no api process is there, and goes on when they are back', async () => {
    await Promise.all(stack.apis.map((api) => api.stop()));
    // A text that would end the JSON string it stands in, if it were let in.
    const { status, body, headers } = await studio.json<object>('/api/executions/"', {
      headers: { 'X-Request-Id': 'a"b' },
    });
    expect(status).toBe(503);
    expect(headers.get('content-type')).toBe('application/problem+json');
    expect(headers.get('retry-after')).toBe('1');
    expect(body).toMatchObject({ status: 503, code: 'unavailable', request_id: headers.get('x-request-id') });
    const named = await studio.json<object>('/api/executions', { headers: { 'X-Request-Id': 'mine-1' } });
    expect(named.body).toMatchObject({ instance: '/api/executions', request_id: 'mine-1' });

    await Promise.all(stack.apis.map((api) => api.start()));
    await untilPasses(async () => expect((await studio.json('/health/ready')).status).toBe(200));
  });

  it.each(['/metrics', '/METRICS/', '/%6detrics'])('keeps %s to itself', async (path) => {
    const { status, body } = await studio.json<object>(path);
    expect(status).toBe(404);
    expect(body).toMatchObject({ code: 'not_found' });
  });

  it('refuses a body that is too large as the server does', async () => {
    const { status, body } = await studio.json<object>('/api/workflows', {
      method: 'POST',
      body: ' '.repeat(1_048_577),
    });
    expect(status).toBe(413);
    expect(body).toMatchObject({ code: 'payload_too_large', instance: '/api/workflows' });
  });
});

describe('npm run stack', () => {
  let folder: string;
  let started: ChildProcess[] = [];

  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'agent-studio-test-'));
  });
  afterEach(async () => {
    for (const child of started) child.kill('SIGKILL');
    started = [];
    await until(() => processesBelow(folder).length === 0);
    await rm(folder, { recursive: true, force: true });
  });

  /** Runs it in the folder; `said` is what it printed until now. */
  function run(env: Record<string, string>) {
    const child = spawn(process.execPath, [SCRIPT, '--api', '1', '--workers', '1'], {
      cwd: folder,
      env: { PATH: process.env['PATH'], PORT: '0', SHUTDOWN_GRACE_MS: '500', ...env },
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    started.push(child);
    const result = { child, said: '', ended: once(child, 'close') as Promise<[number | null]> };
    for (const output of [child.stdout, child.stderr]) {
      output.setEncoding('utf8').on('data', (text: string) => (result.said += text));
    }
    return result;
  }

  /** Waits until it has started everything; answers with the process ids by name. */
  async function untilStarted(stack: ReturnType<typeof run>): Promise<Map<string, number>> {
    await until(() => stack.said.includes('Ctrl-C') || stack.child.exitCode !== null, START_TIMEOUT_MS);
    const lines = stack.said.matchAll(/^ {2}(\S+) +\S+ +pid (\d+)$/gm);
    const pids = new Map([...lines].map(([, name = '', pid]) => [name, Number(pid)]));
    expect([...pids.keys()]).toEqual(expect.arrayContaining(['api-1', 'worker-1', 'postgres']));
    return pids;
  }

  it(
    'leaves no process behind when it is killed, not even one that is stopped',
    async () => {
      const stack = run({});
      const pids = await untilStarted(stack);
      process.kill(pids.get('worker-1') ?? 0, 'SIGSTOP');
      expect(processesBelow(folder)).toEqual(expect.arrayContaining([...pids.values()]));

      stack.child.kill('SIGKILL');

      await until(() => processesBelow(folder).length === 0, 60_000);
    },
    START_TIMEOUT_MS,
  );

  it(
    'ends everything at the first signal, and pays no heed to a second one',
    async () => {
      const stack = run({});
      await untilStarted(stack);
      stack.child.kill('SIGINT');
      await until(() => stack.said.includes('stopping everything'));
      stack.child.kill('SIGTERM');

      expect(await stack.ended).toEqual([0, null]);
      expect(stack.said).toMatch(/\nStopped\.\n$/);
      expect(processesBelow(folder)).toEqual([]);
    },
    START_TIMEOUT_MS,
  );

  it('says that its port is taken before it starts anything', async () => {
    const other = createServer().listen(0, '127.0.0.1');
    await once(other, 'listening');
    const { port } = other.address() as AddressInfo;
    const stack = run({ PORT: String(port) });

    expect((await stack.ended)[0]).toBe(1);
    other.close();
    expect(stack.said).toContain(`The port ${port} of 127.0.0.1`);
    expect(stack.said).toContain('set PORT to another port');
    expect(processesBelow(folder)).toEqual([]);
  });

  it.each([
    ['a bad configuration', { JOB_LOCK_MS: 'soon' }, 'JOB_LOCK_MS: must be a whole number'],
    ['a database that is not there', { DATABASE_URL: 'postgres://u:p@127.0.0.1:1/d' }, 'ECONNREFUSED'],
  ])('says once what is wrong with %s', async (_what, env, text) => {
    const stack = run(env);

    expect((await stack.ended)[0]).toBe(1);
    expect(stack.said.split(text)).toHaveLength(2);
    expect(stack.said).not.toContain('    at '); // no stack trace
    expect(processesBelow(folder)).toEqual([]);
  });
});

async function openStreamsOf(stack: Stack): Promise<number> {
  const counts = await Promise.all(
    stack.apis.map(({ url }) => new Studio(url).metric('agent_studio_open_streams')),
  );
  return counts.reduce((sum, count) => sum + count, 0);
}

async function acceptedAt(url: string): Promise<number> {
  const metrics = await (await fetch(`${url}/metrics`)).text();
  return Number(/^agent_studio_executions_total\{state="queued"\} (\d+)$/m.exec(metrics)?.[1] ?? 0);
}

const runningAt = (url: string) => new Studio(url).metric('agent_studio_executions_running');

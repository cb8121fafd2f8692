import { EventEmitter, once } from 'node:events';
import { describe, expect, it } from '@jest/globals';
import { startTestApp } from '../support/app.js';
import { createTestDatabase } from '../support/database.js';
import { ServerProcess } from '../support/studio-process.js';
import { Studio, faultsOfStream, kept, textOf, until, upstreamAgent } from '../support/studio.js';
import type { EventStream, Frame } from '../support/studio.js';
import { Upstream, chatDelta, chatEnd, writeStream } from '../support/upstream.js';

it('a server that shuts down ends its streams without a terminal chunk, and another one goes on', async () => {
  const calls = new Map<string, number>();
  const upstream = await Upstream.start((response, { body }) => {
    const query = JSON.stringify(body.messages);
    const call = (calls.get(query) ?? 0) + 1;
    calls.set(query, call);
    writeStream(response, chatDelta(`attempt ${call} `));
    if (call === 1) return;
    writeStream(response, chatDelta('to the end'), chatEnd());
    response.end();
  });
  const env = {
    MODEL_PROVIDERS: JSON.stringify({ upstream: { type: 'openai-compatible', base_url: upstream.url } }),
  };
  const first = await startTestApp(env);
  const second = await startTestApp({ ...env, ROLE: 'api' }, first.database);
  try {
    const client = new Studio(first.url);
    const deployment = await client.deploy({
      agents: [
        { agent_id: 'greeter', agent_type: 'template', config: { template: 'hi' } },
        ...upstreamAgent().agents,
      ],
      connections: [{ source_agent_id: 'greeter', target_agent_id: 'writer' }],
    });
    const stream = await client.stream({ deployment_name: deployment, query: 'x' });
    const waiting = client.execute({ deployment_name: deployment, query: 'y' });
    const head: Awaited<ReturnType<typeof stream.frames>> = [];
    const closing: Promise<void>[] = [];
    for await (const frame of stream) {
      head.push(frame);
      if (frame.chunk.type === 'content' && closing.length === 0) closing.push(first.app.close());
    }
    expect(textOf(head)).toBe('attempt 1 ');
    expect(head.at(-1)?.chunk.type).toBe('content');
    await Promise.all(closing);
    expect((await waiting).status).toBe(503);

    const third = await startTestApp({ ...env, ROLE: 'worker' }, first.database);
    const { executionId } = stream;
    const rest = await (await new Studio(second.url).follow(executionId, head.length)).frames();
    await third.close();
    const frames = [...head, ...rest];
    expect(faultsOfStream(frames, executionId)).toEqual([]);
    const restarted = rest.findIndex(({ chunk }) => chunk.status === 'restarted');
    expect(rest[restarted]?.chunk).toMatchObject({ agent_id: 'writer', discard_after: 1 });
    expect(textOf(rest.slice(restarted))).toBe('attempt 2 to the end');
    const { body } = await new Studio(second.url).json<{ items: { agent_id: string; attempt: number }[] }>(
      `/api/executions/${executionId}/steps`,
    );
    expect(body.items.map(({ agent_id, attempt }) => [agent_id, attempt])).toEqual([
      ['greeter', 1],
      ['writer', 2],
    ]);
  } finally {
    await second.close();
    await first.database.drop();
    await upstream.stop();
  }
});

describe('SIGTERM', () => {
  const half = Array.from({ length: 30 }, (_, index) => `word ${index} 🙂\n`);
  /** `go on` lets the model say the second half of the answers that wait for it. */
  const conductor = new EventEmitter();
  let calls: string[] = [];

  /** Servers on a database of their own, whose models `steady` and `broken` stop in the middle of an answer. */
  async function withServers(
    work: (start: (env?: Record<string, string>) => Promise<ServerProcess>) => Promise<void>,
  ): Promise<void> {
    calls = [];
    const upstream = await Upstream.start(async (response, { body }) => {
      const model = String(body.model);
      const isRepeated = calls.includes(model);
      calls.push(model);
      writeStream(response, ...half.map(chatDelta));
      // The call of the worker that shuts down never comes to its end, the one of the next worker does.
      if (model === 'broken' && !isRepeated) return;
      if (model === 'steady') await once(conductor, 'go on');
      writeStream(response, ...half.map(chatDelta), chatEnd());
      response.end();
    });
    const database = await createTestDatabase();
    const servers: ServerProcess[] = [];
    const provider = { type: 'openai-compatible', base_url: upstream.url };
    const start = async (env: Record<string, string> = {}) => {
      const MODEL_PROVIDERS = JSON.stringify({ upstream: provider });
      const server = await ServerProcess.start({ DATABASE_URL: database.url, MODEL_PROVIDERS, ...env });
      servers.push(server);
      return server;
    };
    try {
      await work(start);
    } finally {
      await Promise.all(servers.map((server) => server.stop('SIGKILL')));
      await database.drop();
      await upstream.stop();
    }
  }

  /** Reads to the end of the connection; `work` is begun when this many chunks of content have come. */
  async function readWhile(
    stream: EventStream,
    { contents, work }: { contents: number; work: () => Promise<void> },
  ): Promise<Frame[]> {
    const frames: Frame[] = [];
    let working: Promise<void> | undefined;
    for await (const frame of stream) {
      frames.push(frame);
      if (frames.filter(({ chunk }) => chunk.type === 'content').length === contents) working ??= work();
    }
    await working;
    return frames;
  }

  /** The bytes of a stream without the line that comes once in each connection. */
  const bytesOf = (...streams: EventStream[]) =>
    streams.map(({ raw }) => raw.replace(/^retry: \d+\n/m, '')).join('');

  it('ends the streams of a process that runs nothing between two chunks, and another one has the rest to the byte', async () => {
    await withServers(async (start) => {
      const drained = await start({ ROLE: 'api' });
      const other = await start({ ROLE: 'api' });
      await start({ ROLE: 'worker' });
      const client = new Studio(drained.url);
      const deployment = await client.deploy(upstreamAgent({ model: 'upstream/steady' }));
      const stream = await client.stream({ deployment_name: deployment, query: 'x' });
      const { executionId } = stream;
      const head = await readWhile(stream, { contents: half.length, work: () => drained.stop() });
      expect(drained.process.exitCode).toBe(0);
      expect(head.at(-1)?.chunk.type).toBe('content');
      expect(stream.raw).toMatch(/\n\n$/);

      conductor.emit('go on');
      const again = new Studio(other.url);
      const rest = await again.follow(executionId, head.length);
      const frames = [...head, ...(await rest.frames())];
      expect(faultsOfStream(frames, executionId)).toEqual([]);
      expect(textOf(frames)).toBe(half.join('').repeat(2));
      const whole = await again.follow(executionId);
      await whole.frames();
      expect(bytesOf(stream, rest)).toBe(bytesOf(whole));
      expect(calls).toEqual(['steady']);
    });
  });

  it('lets a step that ends within its grace period end, and the stream with it', async () => {
    await withServers(async (start) => {
      const drained = await start({ SHUTDOWN_GRACE_MS: '30000' });
      const client = new Studio(drained.url);
      const deployment = await client.deploy(upstreamAgent({ model: 'upstream/steady' }));
      const stream = await client.stream({ deployment_name: deployment, query: 'x' });
      const finish = async () => {
        const stopped = drained.stop();
        await until(async () => (await client.json('/health/ready')).status === 503 || undefined);
        drained.process.kill('SIGTERM'); // a second one changes nothing
        conductor.emit('go on');
        await stopped;
      };
      const frames = await readWhile(stream, { contents: half.length, work: finish });
      expect(faultsOfStream(frames, stream.executionId)).toEqual([]);
      expect(textOf(frames)).toBe(half.join('').repeat(2));
      expect(drained.process.exitCode).toBe(0);
    });
  });

  it('in the middle of a step: another process runs it again, and what `restarted` says to discard makes the text whole', async () => {
    await withServers(async (start) => {
      const drained = await start({ SHUTDOWN_GRACE_MS: '0' });
      const client = new Studio(drained.url);
      const agent = (id: string) => ({
        ...upstreamAgent({ model: `upstream/${id}` }).agents[0],
        agent_id: id,
      });
      const deployment = await client.deploy({ agents: [agent('broken'), agent('quick')] });
      const stream = await client.stream({ deployment_name: deployment, query: 'x' });
      const { executionId } = stream;
      const interrupt = async () => {
        await until(async () => {
          const { body } = await client.json<{ items: object[] }>(`/api/executions/${executionId}/steps`);
          return body.items.some((step) => 'status' in step && step.status === 'completed') || undefined;
        });
        await drained.stop();
      };
      const head = await readWhile(stream, { contents: 3 * half.length, work: interrupt });
      expect(drained.process.exitCode).toBe(0);
      expect(faultsOfStream(head, executionId)).toEqual([
        `chunk ${head.length} of ${head.length} has status undefined`,
      ]);

      const other = new Studio((await start()).url);
      const frames = [...head, ...(await (await other.follow(executionId, head.length)).frames())];
      expect(faultsOfStream(frames, executionId)).toEqual([]);
      expect(textOf(frames, 'broken').length).toBeGreaterThan(half.join('').length * 2);
      const answer = half.join('').repeat(2);
      expect(textOf(kept(frames), 'broken')).toBe(answer);
      expect(textOf(kept(frames), 'quick')).toBe(answer);
      const { body } = await other.json(`/api/executions/${executionId}`);
      expect(body).toMatchObject({ status: 'completed', response: `${answer}\n\n${answer}` });
      expect(calls.toSorted()).toEqual(['broken', 'broken', 'quick']);
    });
  });
});

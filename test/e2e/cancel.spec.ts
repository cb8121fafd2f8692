import { randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { beforeAll, describe, expect, it } from '@jest/globals';
import { itInFull, rounds } from '../support/effort.js';
import { expectByChance } from '../support/inconclusive.js';
import { faultsOfStream, textOf, until, upstreamAgent } from '../support/studio.js';
import type { Frame } from '../support/studio.js';
import { chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import { withStudio } from '../support/with-studio.js';
import { WsClient } from '../support/ws-client.js';

interface Cancelled {
  status: number;
  body: { status?: string; code?: string };
}

const server = withStudio({
  upstream: (response, request) => {
    writeStream(response, chatDelta('word '));
    if (request.body.model === 'endless') return;
    // Slow enough for a chain of them to outlast a worker's next look at what was cancelled.
    const timer = setTimeout(() => {
      writeStream(response, chatDelta('end'), chatEnd());
      response.end();
    }, 25);
    response.on('close', () => clearTimeout(timer));
  },
  others: { api: { ROLE: 'api' } },
});
const { studio, upstream } = server;
const { api } = server.others;
/** A process that no worker takes anything from, unless a test starts one. */
const idle = withStudio({ env: { ROLE: 'api' } });

const cancel = (id: string, at = studio): Promise<Cancelled> =>
  at.json(`/api/executions/${id}/cancel`, { method: 'POST' });

const statusOf = async (id: string) =>
  (await studio.json<{ status: string; response?: string }>(`/api/executions/${id}`)).body;

const requestsOf = (query: string) =>
  upstream.requests.filter(({ body }) => JSON.stringify(body).includes(query));

/** A chain of agents, each of which calls the upstream. */
const chain = (length: number) => ({
  agents: Array.from({ length }, (_, index) => ({
    agent_id: `a${index}`,
    agent_type: 'llm',
    config: { model: 'upstream/quick', max_retries: 0 },
  })),
  connections: Array.from({ length: length - 1 }, (_, index) => ({
    source_agent_id: `a${index}`,
    target_agent_id: `a${index + 1}`,
  })),
});

describe('cancel', () => {
  it('of a run that somebody else streams ends it for all, closes the upstream and keeps the text so far', async () => {
    const deployment = await studio.deploy({
      agents: ['left', 'right'].map((agent_id) => ({
        agent_id,
        agent_type: 'llm',
        config: { model: 'upstream/endless', max_retries: 0 },
      })),
    });
    const query = randomUUID();
    const begun = await studio.stream({ deployment_name: deployment, query });
    const id = begun.executionId;
    const other = await studio.follow(id);
    const frames: Frame[] = [];
    for await (const frame of begun) {
      frames.push(frame);
      if (frames.length === 3) {
        expect(await cancel(id)).toMatchObject({ status: 202, body: { status: 'cancelled' } });
      }
    }
    expect(faultsOfStream(frames, id)).toEqual([]);
    expect(frames.at(-1)?.chunk).toMatchObject({ status: 'cancelled' });
    expect((await other.frames()).map(({ data }) => data)).toEqual(frames.map(({ data }) => data));
    expect(requestsOf(query)).toHaveLength(2);
    expect(await Promise.all(requestsOf(query).map(({ closed }) => closed))).toEqual([true, true]);
    expect(textOf(frames, 'left')).toBe('word ');
    const { response } = await statusOf(id);
    expect(response).toContain('word ');
    expect(response?.split('word ')).toHaveLength(3);
  });

  it('again, and many at once, changes nothing', async () => {
    const deployment = await studio.deploy(upstreamAgent({ model: 'upstream/endless' }));
    const stream = await studio.stream({ deployment_name: deployment, query: randomUUID() });
    const id = stream.executionId;
    const answers = await Promise.all(Array.from({ length: 20 }, () => cancel(id)));
    answers.push(await cancel(id));
    expect(new Set(answers.map(({ status }) => status))).toEqual(new Set([202]));
    const frames = await stream.frames();
    expect(faultsOfStream(frames, id)).toEqual([]);
    expect((await (await studio.follow(id)).frames()).map(({ data }) => data)).toEqual(
      frames.map(({ data }) => data),
    );
  });

  it('of a finished execution is refused, and of an unknown one too', async () => {
    const deployment = await studio.deploy(upstreamAgent());
    const stream = await studio.stream({ deployment_name: deployment, query: 'x' });
    await stream.frames();
    const finished = await cancel(stream.executionId);
    expect(finished).toMatchObject({ status: 409, body: { code: 'execution_finished' } });
    const unknown = await cancel('01900000-0000-7000-8000-00000000ffff');
    expect(unknown).toMatchObject({ status: 404, body: { code: 'execution_not_found' } });
  });

  it('before the start ends the execution without running it', async () => {
    const client = idle.studio;
    const deployment = await client.deploy({
      agents: [{ agent_id: 'a', agent_type: 'template', config: { template: 'ran' } }],
    });
    const stream = await client.stream({ deployment_name: deployment, query: 'x' });
    expect(await cancel(stream.executionId, client)).toMatchObject({
      status: 202,
      body: { status: 'cancelled' },
    });
    const worker = await idle.startAnother({ ROLE: 'all' });
    const frames = await stream.frames();
    expect(frames.map(({ chunk }) => chunk.status)).toEqual(['started', 'cancelled']);
    const next = await client.stream({ deployment_name: deployment, query: 'x' });
    expect(textOf(await next.frames())).toBe('ran');
    const steps = await client.json<{ items: unknown[] }>(`/api/executions/${stream.executionId}/steps`);
    expect(steps.body.items).toEqual([]);
    await worker.close();
  });
});

describe.each([
  ['at the process that runs it', () => studio],
  ['at another process', () => api.studio],
])('after the answer to a cancellation %s', (_name, client) => {
  it('no step begins, and the upstream has lost its connections', async () => {
    const deployment = await studio.deploy(chain(60));
    for (let round = 0; round < rounds(5, 2); round++) {
      const query = randomUUID();
      const stream = await client().stream({ deployment_name: deployment, query });
      const id = stream.executionId;
      await until(() => requestsOf(query).length > round || undefined);
      expect(await cancel(id, client())).toMatchObject({ status: 202, body: { status: 'cancelled' } });
      const begun = requestsOf(query).length;
      expect(begun).toBeLessThan(60);
      const frames = await stream.frames();
      expect(frames.at(-1)?.chunk.status).toBe('cancelled');
      expect(faultsOfStream(frames, id)).toEqual([]);
      await Promise.all(requestsOf(query).map(({ closed }) => closed));
      expect(requestsOf(query)).toHaveLength(begun);
    }
  });
});

it('a cancellation that races the end is either kept or refused, never acknowledged and ignored', async () => {
  const deployment = await studio.deploy({
    agents: [{ agent_id: 'a', agent_type: 'template', config: { template: 'done' } }],
  });
  const outcomes = { 202: 0, 409: 0 };
  // Cancels earlier after each run that was faster and later after each that was not, so that both keep happening.
  let delay = 5;
  for (let round = 0; round < rounds(60, 12); round++) {
    const stream = await studio.stream({ deployment_name: deployment, query: 'x' });
    const id = stream.executionId;
    if (delay > 0) await sleep(delay);
    const { status } = await cancel(id, round % 2 === 0 ? studio : api.studio);
    if (status !== 202 && status !== 409) throw new Error(`The cancellation was answered with ${status}.`);
    outcomes[status]++;
    delay = Math.max(0, delay + (status === 202 ? 1 : -1));
    const frames = await stream.frames();
    const end = status === 202 ? 'cancelled' : 'completed';
    expect([faultsOfStream(frames, id), frames.at(-1)?.chunk.status]).toEqual([[], end]);
    expect((await statusOf(id)).status).toBe(end);
    const replay = await (await studio.follow(id)).frames();
    expect(replay.map(({ data }) => data)).toEqual(frames.map(({ data }) => data));
  }
  expectByChance('cancellations that were kept', outcomes[202], rounds(4, 1));
  expectByChance('cancellations that came too late', outcomes[409], rounds(4, 1));
});

describe('cancel over a WebSocket', () => {
  let endless: string;

  beforeAll(async () => {
    endless = await studio.deploy(upstreamAgent({ model: 'upstream/endless' }));
  });

  it.each([
    ['on its own socket', () => undefined],
    ['from another socket', () => server.url],
    ['from another process', () => api.url],
  ])(
    '%s ends the stream, closes the upstream, keeps the text, and nothing follows the terminal chunk',
    async (_name, at) => {
      const client = await WsClient.open(server.url);
      const url = at();
      const other = url ? await WsClient.open(url) : client;
      const query = randomUUID();
      const { id, executionId } = await client.execute({ deployment_name: endless, query });
      await client.until(() => client.frames(id).length >= 2);
      const answers = await Promise.all(
        [1, 2, 3].map(() => other.ask('cancel', { execution_id: executionId })),
      );
      for (const answer of answers) {
        expect(answer).toMatchObject({
          event: 'cancelled',
          data: { execution_id: executionId, status: 'cancelled' },
        });
      }
      const frames = await client.whole(id);
      expect(faultsOfStream(frames, executionId)).toEqual([]);
      expect(frames.at(-1)?.chunk.status).toBe('cancelled');
      expect(await Promise.all(requestsOf(query).map(({ closed }) => closed))).toEqual([true]);
      const { body } = await studio.json<{ response: string }>(`/api/executions/${executionId}`);
      expect(body.response).toBe(textOf(frames));
      await client.ask('ping');
      const later = client.answers.slice(client.answers.findIndex(({ event }) => event === 'end') + 1);
      expect(later.every(({ event }) => event === 'cancelled' || event === 'pong')).toBe(true);
      await Promise.all([...new Set([client, other])].map((each) => each.close()));
    },
  );

  it('lets no step begin after its answer', async () => {
    const slow = await studio.deploy(chain(60));
    const client = await WsClient.open(api.url);
    for (let round = 0; round < rounds(5, 2); round++) {
      const query = randomUUID();
      const { id, executionId } = await client.execute({ deployment_name: slow, query });
      await until(() => requestsOf(query).length > round);
      expect(await client.ask('cancel', { execution_id: executionId })).toMatchObject({ event: 'cancelled' });
      const begun = requestsOf(query).length;
      expect(begun).toBeLessThan(60);
      const frames = await client.whole(id);
      expect(faultsOfStream(frames, executionId)).toEqual([]);
      await Promise.all(requestsOf(query).map(({ closed }) => closed));
      expect(requestsOf(query)).toHaveLength(begun);
    }
    await client.close();
  });

  itInFull('before the start ends the execution without running it', async () => {
    const client = await WsClient.open(idle.url);
    try {
      const deployment = await idle.studio.deploy(upstreamAgent({ model: 'offline/echo' }));
      const { id, executionId } = await client.execute({ deployment_name: deployment, query: 'x' });
      expect(await client.ask('cancel', { execution_id: executionId })).toMatchObject({
        event: 'cancelled',
        data: { status: 'cancelled', attempts: 0 },
      });
      const frames = await client.whole(id);
      expect(frames.map(({ chunk }) => chunk.status)).toEqual(['started', 'cancelled']);
    } finally {
      await client.close();
    }
  });

  it('of one of many leaves the others of the socket alone', async () => {
    const client = await WsClient.open(server.url);
    const runs = await Promise.all(
      Array.from({ length: 20 }, () => client.execute({ deployment_name: endless, query: randomUUID() })),
    );
    await client.until(() => runs.every(({ id }) => client.frames(id).length >= 2));
    const [first, ...others] = runs;
    await client.ask('cancel', { execution_id: first?.executionId });
    await client.whole(first?.id ?? '');
    await client.ask('ping');
    for (const { id } of others) expect(client.frames(id)).toHaveLength(2);
    await Promise.all(others.map(({ executionId }) => client.ask('cancel', { execution_id: executionId })));
    for (const { id } of others) expect((await client.whole(id)).at(-1)?.chunk.status).toBe('cancelled');
    await client.close();
  });
});

import { randomUUID } from 'node:crypto';
import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { startTestApp } from '../support/app.js';
import type { TestApp } from '../support/app.js';
import { itInFull, rounds } from '../support/effort.js';
import { Studio, faultsOfStream, textOf, until, upstreamAgent } from '../support/studio.js';
import { Upstream, chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import { WsClient } from '../support/ws-client.js';

let upstream: Upstream;
let api: TestApp;
let server: TestApp;
let studio: Studio;
/** One endless call, and a chain of many short ones. */
let endless: string;
let chain: string;

beforeAll(async () => {
  upstream = await Upstream.start((response, request) => {
    writeStream(response, chatDelta('word '));
    if (request.body.model === 'endless') return;
    const timer = setTimeout(() => {
      writeStream(response, chatDelta('end'), chatEnd());
      response.end();
    }, 25);
    response.on('close', () => clearTimeout(timer));
  });
  const provider = { type: 'openai-compatible', base_url: upstream.url };
  const env = { MODEL_PROVIDERS: JSON.stringify({ upstream: provider }) };
  server = await startTestApp(env);
  api = await startTestApp({ ...env, ROLE: 'api' }, server.database);
  studio = new Studio(server.url);
  endless = await studio.deploy(upstreamAgent({ model: 'upstream/endless' }));
  const agents = Array.from({ length: 60 }, (_, index) => ({
    agent_id: `a${index}`,
    agent_type: 'llm',
    config: { model: 'upstream/quick', max_retries: 0 },
  }));
  const connections = agents.slice(1).map(({ agent_id }, index) => ({
    source_agent_id: `a${index}`,
    target_agent_id: agent_id,
  }));
  chain = await studio.deploy({ agents, connections });
});
afterAll(async () => {
  await api.close();
  await server.close();
  await upstream.stop();
});

const requestsOf = (query: string) =>
  upstream.requests.filter(({ body }) => JSON.stringify(body).includes(query));

describe('cancel', () => {
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
    const client = await WsClient.open(api.url);
    for (let round = 0; round < rounds(5, 2); round++) {
      const query = randomUUID();
      const { id, executionId } = await client.execute({ deployment_name: chain, query });
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
    const idle = await startTestApp({ ROLE: 'api' });
    const client = await WsClient.open(idle.url);
    try {
      const deployment = await new Studio(idle.url).deploy(upstreamAgent({ model: 'offline/echo' }));
      const { id, executionId } = await client.execute({ deployment_name: deployment, query: 'x' });
      expect(await client.ask('cancel', { execution_id: executionId })).toMatchObject({
        event: 'cancelled',
        data: { status: 'cancelled', attempts: 0 },
      });
      const frames = await client.whole(id);
      expect(frames.map(({ chunk }) => chunk.status)).toEqual(['started', 'cancelled']);
    } finally {
      await client.close();
      await idle.close();
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

import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { startTestApp } from '../support/app.js';
import type { TestApp } from '../support/app.js';
import { Studio, faultsOfStream, textOf, until, upstreamAgent } from '../support/studio.js';
import type { Frame } from '../support/studio.js';
import { Upstream, chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import type { UpstreamAnswer } from '../support/upstream.js';

/** How the upstream behaves, by the model that it is asked for. */
const behaviours: Record<string, UpstreamAnswer> = {
  hangs: () => {},
  'hangs-after-a-word': (response) => writeStream(response, chatDelta('word')),
  'resets-mid-chunk': (response) => {
    writeStream(response, chatDelta('word'), chatDelta('half').slice(0, 20));
    setImmediate(() => response.socket?.resetAndDestroy());
  },
  'answers-429': (response) => {
    response.writeHead(429, { 'retry-after': '1', 'content-type': 'application/json' });
    response.end('{"error": {"message": "secret upstream body"}}');
  },
  'answers-401': (response) => {
    response.writeHead(401, { 'content-type': 'application/json' });
    response.end('{"error": {"message": "bad key sk-secret"}}');
  },
  'half-json': (response) => {
    writeStream(response, chatDelta('word'), 'data: {"choices": [{"delta": {"con\n\n');
    response.end();
  },
  'ends-without-finish': (response) => {
    writeStream(response, chatDelta('word'));
    response.end();
  },
  'never-ends': (response) => {
    const timer = setInterval(() => writeStream(response, chatDelta('more ')), 5);
    response.on('close', () => clearInterval(timer));
  },
};

let upstream: Upstream;
let server: TestApp;
let studio: Studio;

beforeAll(async () => {
  upstream = await Upstream.start((response, request) => {
    const behaviour = behaviours[String(request.body.model)];
    if (behaviour) return behaviour(response, request);
    writeStream(response, chatDelta('fine'), chatEnd());
    return response.end();
  });
  const provider = { type: 'openai-compatible', base_url: upstream.url, timeout_ms: 1000 };
  const locked = { type: 'openai', api_key_env: 'NOT_SET_ANYWHERE', base_url: upstream.url };
  server = await startTestApp({ MODEL_PROVIDERS: JSON.stringify({ upstream: provider, locked }) });
  studio = new Studio(server.url);
});
afterAll(async () => {
  await server.close();
  await upstream.stop();
});

async function run(deployment: string, body: object = {}): Promise<{ id: string; frames: Frame[] }> {
  const stream = await studio.stream({ deployment_name: deployment, query: 'x', ...body });
  return { id: stream.executionId, frames: await stream.frames() };
}

describe('a terminal chunk comes exactly once and last', () => {
  const cases: [string, string, { text: string; code: string }][] = [
    ['the upstream hangs before the first byte', 'hangs', { text: '', code: 'timeout' }],
    ['the upstream hangs after a word', 'hangs-after-a-word', { text: 'word', code: 'timeout' }],
    [
      'the upstream resets in the middle of a chunk',
      'resets-mid-chunk',
      { text: 'word', code: 'model_error' },
    ],
    ['the upstream answers 429', 'answers-429', { text: '', code: 'model_error' }],
    ['the upstream refuses the key', 'answers-401', { text: '', code: 'model_error' }],
    ['the upstream sends half a JSON', 'half-json', { text: 'word', code: 'model_error' }],
    ['the upstream ends without saying so', 'ends-without-finish', { text: 'word', code: 'model_error' }],
  ];
  it.each(cases)('when %s', async (_name, model, expected) => {
    const deployment = await studio.deploy(upstreamAgent({ model: `upstream/${model}` }));
    const { id, frames } = await run(deployment);
    expect(faultsOfStream(frames, id)).toEqual([]);
    expect(textOf(frames)).toBe(expected.text);
    const last = frames.at(-1)?.chunk;
    expect(last).toMatchObject({ type: 'status', status: 'error', code: expected.code });
    expect(last?.error).toMatch(/\w/);
    expect(JSON.stringify(frames)).not.toMatch(/secret|at .*\.[jt]s:/);
    const { body } = await studio.json(`/api/executions/${id}`);
    expect(body).toMatchObject({ status: 'error', response: expected.text, error: { code: expected.code } });
  });

  it('when the upstream never ends, at the limit of the run', async () => {
    const deployment = await studio.deploy(upstreamAgent({ model: 'upstream/never-ends' }), { timeout: 0.5 });
    const { id, frames } = await run(deployment);
    expect(faultsOfStream(frames, id)).toEqual([]);
    expect(frames.at(-1)?.chunk).toMatchObject({ status: 'error', code: 'timeout' });
    expect(textOf(frames)).toMatch(/^(more )+$/);
    await until(() => upstream.openConnections === 0 || undefined);
  });

  it('when the request asks for a shorter limit than the deployment', async () => {
    const deployment = await studio.deploy(upstreamAgent({ model: 'upstream/hangs' }), { timeout: 600 });
    const { frames } = await run(deployment, { runtime_overrides: { timeout: 0.2 } });
    expect(frames.at(-1)?.chunk).toMatchObject({ status: 'error', code: 'timeout' });
  });

  it('when the key of the provider is missing, before the first step said anything', async () => {
    const deployment = await studio.deploy(upstreamAgent({ model: 'locked/gpt' }));
    const { id, frames } = await run(deployment);
    expect(faultsOfStream(frames, id)).toEqual([]);
    expect(frames.at(-1)?.chunk).toMatchObject({ status: 'error', code: 'model_not_configured' });
    expect(frames.at(-1)?.chunk.error).toContain('NOT_SET_ANYWHERE');
  });

  it('when a provider is gone that the deployment was made with', async () => {
    const deployment = await studio.deploy(upstreamAgent());
    const other = await startTestApp({}, server.database);
    try {
      const answer = await new Studio(other.url).json<{ code: string }>('/api/workflows/execute/stream', {
        method: 'POST',
        body: { deployment_name: deployment, query: 'x' },
      });
      expect(answer.status).toBeGreaterThanOrEqual(400);
      expect(answer.status).toBeLessThan(500);
      expect(answer.body.code).toMatch(/workflow_invalid|model_not_configured/);
    } finally {
      await other.close();
    }
  });

  it('when the worker can not run what another process accepted, instead of trying it for ever', async () => {
    const provider = { type: 'openai-compatible', base_url: upstream.url };
    const accepting = await startTestApp({
      ROLE: 'api',
      MODEL_PROVIDERS: JSON.stringify({ upstream: provider }),
    });
    const worker = await startTestApp({ ROLE: 'worker' }, accepting.database);
    try {
      const client = new Studio(accepting.url);
      const deployment = await client.deploy(upstreamAgent());
      const stream = await client.stream({ deployment_name: deployment, query: 'x' });
      const frames = await stream.frames();
      expect(faultsOfStream(frames, stream.executionId)).toEqual([]);
      expect(frames.at(-1)?.chunk).toMatchObject({ status: 'error', code: 'workflow_invalid' });
    } finally {
      await worker.close();
      await accepting.close();
    }
  });

  it('when a template or an expression fails while it runs', async () => {
    const expression = await studio.deploy({
      agents: [
        { agent_id: 'a', agent_type: 'template', config: { template: 'x' } },
        { agent_id: 'b', agent_type: 'template', config: { template: 'y' } },
      ],
      connections: [
        {
          source_agent_id: 'a',
          target_agent_id: 'b',
          connection_type: 'conditional',
          conditions: { expression: 'variables.missing == "x"' },
        },
      ],
    });
    const { id, frames } = await run(expression);
    expect(faultsOfStream(frames, id)).toEqual([]);
    expect(frames.at(-1)?.chunk).toMatchObject({ status: 'error', code: 'agent_error' });
  });
});

it('`execute` answers with the status of the error that ended the run', async () => {
  const failing = await studio.deploy(upstreamAgent({ model: 'upstream/answers-401' }));
  expect(await studio.execute({ deployment_name: failing, query: 'x' })).toMatchObject({
    status: 502,
    body: { code: 'model_error', status: 502 },
  });
  const hanging = await studio.deploy(upstreamAgent({ model: 'upstream/hangs' }), { timeout: 0.2 });
  expect(await studio.execute({ deployment_name: hanging, query: 'x' })).toMatchObject({
    status: 504,
    body: { code: 'timeout' },
  });
});

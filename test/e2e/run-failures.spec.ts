import { beforeEach, describe, expect, it } from '@jest/globals';
import type { Chunk } from '../../src/event-log/chunk.js';
import { IS_FULL, rounds } from '../support/effort.js';
import { expectByChance } from '../support/inconclusive.js';
import { echo, faultsOfStream, textOf, until, upstreamAgent } from '../support/studio.js';
import type { EventStream, Frame } from '../support/studio.js';
import { chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import type { UpstreamAnswer } from '../support/upstream.js';
import { withStudio } from '../support/with-studio.js';
import { Yardstick } from '../support/yardstick.js';

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
  'never-ends-at-full-speed': (response) => {
    writeStream(response);
    const say = () => {
      while (!response.destroyed && response.write(chatDelta('more ')));
    };
    response.on('drain', say);
    say();
  },
  'sends-comments-only': (response) => {
    const timer = setInterval(() => writeStream(response, ': wait\n\n'), 20);
    response.on('close', () => clearInterval(timer));
  },
  'busy-for-1-s': (response) => {
    if (busyCalls.push(performance.now()) === 1) return response.writeHead(429, { 'retry-after': '1' }).end();
    writeStream(response, chatDelta('fine'), chatEnd());
    return response.end();
  },
  'busy-for-30-s': (response) => response.writeHead(429, { 'retry-after': '30' }).end(),
  'busy-for-an-hour': (response) => response.writeHead(429, { 'retry-after': '3600' }).end(),
};

/** When the upstream was asked that is busy for a second. */
const busyCalls: number[] = [];
/** Only ends a test that hangs. */
const HANG_MS = 90_000;
/** The longest silence of an upstream that is waited for, and how much later the terminal chunk may come. */
const SILENCE_MS = 1000;
const DELAY_MS = 2000;
/** Every execution that ran here. */
const ended: { id: string; frames: Frame[] }[] = [];
const server = withStudio({
  upstream: (response, request) => {
    const behaviour = behaviours[String(request.body.model)];
    if (behaviour) return behaviour(response, request);
    writeStream(response, chatDelta('fine'), chatEnd());
    return response.end();
  },
  providers: {
    upstream: { timeout_ms: SILENCE_MS },
    locked: { type: 'openai', api_key_env: 'NOT_SET_ANYWHERE' },
  },
});
const { studio, upstream } = server;

/** Streams to the end. */
async function run(deployment: string, body: object = {}): Promise<{ id: string; frames: Frame[] }> {
  const signal = AbortSignal.timeout(HANG_MS);
  return endOf(await studio.stream({ deployment_name: deployment, query: 'x', ...body }, { signal }));
}

async function endOf(stream: EventStream): Promise<{ id: string; frames: Frame[] }> {
  const execution = { id: stream.executionId, frames: await stream.frames() };
  ended.push(execution);
  expect(faultsOfStream(execution.frames, execution.id)).toEqual([]);
  return execution;
}

const last = (frames: Frame[]) => frames.at(-1)?.chunk;

/** How long an execution took, in ms. */
let yardstick: Yardstick;
beforeEach(async () => {
  yardstick = await Yardstick.lay();
});

/** Expects of an execution that it ended soon after it had waited for so many ms. */
async function expectDuration(id: string, waitedMs: number): Promise<void> {
  const { body } = await studio.json<{ duration_ms: number }>(`/api/executions/${id}`);
  await yardstick.expectAtMost(body.duration_ms - waitedMs, DELAY_MS, 'the execution');
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
    [
      'the upstream sends signs of life and nothing else',
      'sends-comments-only',
      { text: '', code: 'timeout' },
    ],
    ['the upstream answers 429', 'answers-429', { text: '', code: 'model_error' }],
    ['the upstream refuses the key', 'answers-401', { text: '', code: 'model_error' }],
    ['the upstream sends half a JSON', 'half-json', { text: 'word', code: 'model_error' }],
    ['the upstream ends without saying so', 'ends-without-finish', { text: 'word', code: 'model_error' }],
  ];
  /** Silence is waited for in each of these, and once is enough. */
  const silent = ['hangs', 'sends-comments-only'];
  const chosen = cases.filter(([, model]) => IS_FULL || !silent.includes(model));
  it.each(chosen)('when %s', async (_name, model, expected) => {
    const deployment = await studio.deploy(upstreamAgent({ model: `upstream/${model}` }));
    const { id, frames } = await run(deployment);
    expect(textOf(frames)).toBe(expected.text);
    expect(last(frames)).toMatchObject({ type: 'status', status: 'error', code: expected.code });
    expect(last(frames)?.error).toMatch(/\w/);
    expect(JSON.stringify(frames)).not.toMatch(/secret|at .*\.[jt]s:/);
    const { body } = await studio.json(`/api/executions/${id}`);
    expect(body).toMatchObject({ status: 'error', response: expected.text, error: { code: expected.code } });
    await expectDuration(id, SILENCE_MS);
  });

  it.each(['never-ends', 'never-ends-at-full-speed'])(
    'when the upstream %s, at the limit of the run',
    async (model) => {
      const deployment = await studio.deploy(upstreamAgent({ model: `upstream/${model}` }), { timeout: 0.5 });
      const { id, frames } = await run(deployment);
      expect(last(frames)).toMatchObject({ status: 'error', code: 'timeout' });
      expect(textOf(frames)).toMatch(/^(more )*$/);
      expectByChance('words before the limit', textOf(frames).split(' ').length - 1, 1);
      await expectDuration(id, 500);
      const asked = upstream.requests.filter((request) => request.body.model === model);
      expect(await Promise.all(asked.map(({ closed }) => closed))).toEqual(asked.map(() => true));
    },
  );

  it('when the request asks for a shorter limit than the deployment', async () => {
    const deployment = await studio.deploy(upstreamAgent({ model: 'upstream/hangs' }), { timeout: 600 });
    const { frames } = await run(deployment, { runtime_overrides: { timeout: 0.2 } });
    expect(last(frames)).toMatchObject({ status: 'error', code: 'timeout' });
  });

  it('when the upstream is busy: after the wait that it asks for, if that is within the limits', async () => {
    const busy = (model: string) => upstreamAgent({ model: `upstream/${model}`, max_retries: 1 });
    const patient = await run(await studio.deploy(busy('busy-for-1-s')));
    expect(last(patient.frames)?.status).toBe('completed');
    const [first = 0, second = 0, ...more] = busyCalls;
    expect(second - first).toBeGreaterThan(990); // a timer may be a little early
    expect(more).toEqual([]);

    const limited = await run(await studio.deploy(busy('busy-for-30-s'), { timeout: 0.5 }));
    expect(last(limited.frames)).toMatchObject({ status: 'error', code: 'timeout' });
    await expectDuration(limited.id, 500);
    const endless = await run(await studio.deploy(busy('busy-for-an-hour')));
    expect(last(endless.frames)).toMatchObject({ status: 'error', code: 'model_error' });
    await expectDuration(endless.id, 0);
  });

  it('when the limit is over at once', async () => {
    const deployment = await studio.deploy(upstreamAgent({ model: 'upstream/hangs' }), {
      timeout: 0.001,
    });
    const { frames } = await run(deployment);
    expect(frames).toHaveLength(2);
    expect(last(frames)).toMatchObject({ status: 'error', code: 'timeout' });
  });

  it('when the key of the provider is missing, before the first step said anything', async () => {
    const deployment = await studio.deploy(upstreamAgent({ model: 'locked/gpt' }));
    const { frames } = await run(deployment);
    expect(last(frames)).toMatchObject({ status: 'error', code: 'model_not_configured' });
    expect(last(frames)?.error).toContain('NOT_SET_ANYWHERE');
  });

  it('when an agent fails that others wait for, or beside one that never ends', async () => {
    const agent = (agent_id: string, model: string) => ({
      ...upstreamAgent({ model: `upstream/${model}` }).agents[0],
      agent_id,
    });
    const inLine = await studio.deploy({
      agents: [agent('first', 'half-json'), agent('second', 'fine')],
      connections: [{ source_agent_id: 'first', target_agent_id: 'second' }],
    });
    const { frames } = await run(inLine);
    expect(frames).toHaveLength(2);
    expect(last(frames)).toMatchObject({ status: 'error', code: 'model_error' });

    const sideBySide = await studio.deploy({
      agents: [agent('one', 'never-ends'), agent('other', 'hangs-after-a-word')],
    });
    const { id, frames: both } = await run(sideBySide);
    expect(textOf(both, 'other')).toBe('word');
    expect(last(both)).toMatchObject({ status: 'error', code: 'timeout' });
    await expectDuration(id, SILENCE_MS);
    expect(await Promise.all(upstream.requests.slice(-2).map(({ closed }) => closed))).toEqual([true, true]);
  });

  it('when a template or an expression fails while it runs', async () => {
    const says = (agent_id: string, template: string) => ({
      agent_id,
      agent_type: 'template',
      config: { template },
    });
    const failing = {
      template: { agents: [says('a', '{% for i in (1..9999999) %}{{ i | append: query }}{% endfor %}')] },
      expression: {
        agents: [says('a', 'x'), says('b', 'y')],
        connections: [
          {
            source_agent_id: 'a',
            target_agent_id: 'b',
            connection_type: 'conditional',
            conditions: { expression: 'variables.missing == "x"' },
          },
        ],
      },
    };
    for (const configuration of Object.values(failing)) {
      const { frames } = await run(await studio.deploy(configuration));
      expect(last(frames)).toMatchObject({ status: 'error', code: 'agent_error' });
    }
  });
});

describe('a terminal chunk comes before the first step', () => {
  const accepting = withStudio({ env: { ROLE: 'api' }, upstream: (response) => response.end() });
  const client = accepting.studio;

  /** The end of an execution that is accepted here, once there is a worker, who has no provider. */
  async function endOfAccepted(stream: EventStream): Promise<Chunk | undefined> {
    const worker = await accepting.startAnother({ ROLE: 'worker', MODEL_PROVIDERS: '{}' });
    try {
      const { frames } = await endOf(stream);
      expect(frames).toHaveLength(2);
      return last(frames);
    } finally {
      ended.pop(); // its server goes
      await worker.close();
    }
  }

  const nothing = { agents: [{ agent_id: 'a', agent_type: 'template', config: { template: '' } }] };

  it('when the worker can not run what was accepted, instead of trying it for ever', async () => {
    const deployment = await client.deploy(upstreamAgent());
    const stream = await client.stream({ deployment_name: deployment, query: 'x' });
    expect(await endOfAccepted(stream)).toMatchObject({ status: 'error', code: 'workflow_invalid' });
  });

  it('when the worker does not know the model that the request asks for', async () => {
    const deployment = await client.deploy(echo());
    const runtime_overrides = { model: 'upstream/any' };
    const stream = await client.stream({ deployment_name: deployment, query: 'x', runtime_overrides });
    expect(await endOfAccepted(stream)).toMatchObject({ status: 'error', code: 'override_not_allowed' });
  });

  it('when all workers that took it up have died', async () => {
    const stream = await client.stream({ deployment_name: await client.deploy(nothing), query: 'x' });
    await accepting.database.query(
      "UPDATE execution SET attempt = 7, losses = 7, counted_losses = 5 WHERE status = 'queued'",
    );
    expect(await endOfAccepted(stream)).toMatchObject({ status: 'error', code: 'worker_lost' });
  });

  it('when many cancel it at the same moment, and it is the same one for all', async () => {
    const second = await accepting.startAnother();
    const clients = [client, second.studio];
    try {
      const deployment = await client.deploy(nothing);
      for (let round = 0; round < rounds(20, 3); round++) {
        const stream = await client.stream({ deployment_name: deployment, query: 'x' });
        const id = stream.executionId;
        const elsewhere = await Promise.all(clients.map((at) => at.follow(id)));
        const cancel = (_: unknown, index: number) =>
          clients[index % 2]?.json<object>(`/api/executions/${id}/cancel`, { method: 'POST' });
        const answers = await Promise.all(Array.from({ length: 6 }, cancel));
        expect(answers.map((answer) => answer?.status)).toEqual(Array(6).fill(202));
        const log = await (await client.follow(id)).frames();
        expect(log.map(({ chunk }) => chunk.status)).toEqual(['started', 'cancelled']);
        for (const live of [stream, ...elsewhere]) expect(await live.frames()).toEqual(log);
      }
    } finally {
      await second.close();
    }
  });
});

it('an execution whose provider is gone is refused before it starts', async () => {
  const deployment = await studio.deploy(upstreamAgent());
  const other = await server.startAnother({ MODEL_PROVIDERS: '{}' });
  try {
    const answer = await other.studio.json<{ code: string }>('/api/workflows/execute/stream', {
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

it('nothing has followed any terminal chunk, and nothing is left running', async () => {
  expect(ended.length).toBeGreaterThan(rounds(15, 13));
  for (const { id, frames } of ended) {
    const again = await (await studio.follow(id)).frames();
    expect(again.map(({ data }) => data)).toEqual(frames.map(({ data }) => data));
    expect((await studio.follow(id, frames.length)).status).toBe(204);
  }
  await until(async () => (await studio.metric('agent_studio_executions_running')) === 0);
  await Promise.all(upstream.requests.map(({ closed }) => closed));
});

import { request as httpRequest } from 'node:http';
import { beforeAll, describe, expect, it } from '@jest/globals';
import { graphOf, nested, pairs } from '../support/hostile-bodies.js';
import type { Pair } from '../support/hostile-bodies.js';
import { echo } from '../support/studio.js';
import { withStudio } from '../support/with-studio.js';

interface Problem {
  code: string;
  status: number;
  detail: string;
  errors?: { pointer: string; detail: string }[];
}

const server = withStudio();
const { studio } = server;
let deployment: string;

beforeAll(async () => {
  deployment = await studio.deploy(echo());
});

const post = <Body = Problem>(path: string, body: unknown, headers?: Record<string, string>) =>
  studio.json<Body>(path, { method: 'POST', body, headers });
const workflow = (name: string, metadata: unknown) => ({ name, configuration: { ...echo(), metadata } });

/** Many members, none of which is known: what checks them compares each with each. */
const crowded = (members: number) =>
  Object.fromEntries(Array.from({ length: members }, (_, index) => [`k${index}`, 1]));

describe('a request that wants to break the server gets a 4xx that names the fault', () => {
  it.each(['__proto__', 'constructor', 'prototype'])('with the key %s at any depth', async (key) => {
    const { body } = await post<{ workflow_id: string }>('/api/workflows', workflow('harmless', {}));
    const hostile = [`{"${key}": {"polluted": true}}`, `{"a": [{"b": {"${key}": {"polluted": true}}}]}`];
    for (const bad of hostile) {
      const run = `{"deployment_name": "${deployment}", "query": "x", "runtime_overrides": {"variables": ${bad}}}`;
      const other = `{"deployment_name": "${deployment}", "query": "x", "runtime_overrides": {"agents": ${bad}}}`;
      const graph = JSON.stringify(workflow('bad', 'BAD')).replace('"BAD"', bad);
      const deploying = `{"deployment_name": "bad", "runtime_config": {"variables": ${bad}}}`;
      const requests: [string, string][] = [
        ...['', '/stream', '/async'].flatMap((path): [string, string][] => [
          [`/api/workflows/execute${path}`, run],
          [`/api/workflows/execute${path}`, other],
        ]),
        ['/api/workflows', graph],
        [`/api/workflows/${body.workflow_id}/deploy`, deploying],
      ];
      for (const [path, request] of requests) {
        const answer = await post(path, request);
        expect(answer).toMatchObject({ status: 400, body: { code: 'validation_failed' } });
        expect(answer.body.errors?.[0]?.pointer).toContain(`/${key}`);
      }
    }
    expect(({} as Record<string, unknown>).polluted).toBeUndefined();
  });

  it.each([
    ['utf-16le', 415, 'unsupported_media_type'],
    ['"iso-8859-1"', 415, 'unsupported_media_type'],
    ['"UTF-8"', 400, 'validation_failed'],
  ])('with JSON in the charset %s', async (charset, status, code) => {
    const answer = await post('/api/workflows/execute', '{"deployment_name": 1}', {
      'Content-Type': `application/json; charset=${charset}`,
    });
    expect(answer).toMatchObject({ status, body: { code } });
  });

  it('with more members than may be read, before they are', async () => {
    const strangers = Array.from({ length: 60_000 }, (_, index) => `{"k${index}":0}`).join(',');
    const answer = await post('/api/workflows/execute', `{"deployment_name": "x", "query": [${strangers}]}`);
    expect(answer).toMatchObject({ status: 400, body: { code: 'validation_failed' } });
    expect(answer.body.errors).toEqual([
      { pointer: '', detail: 'has 120002 members and elements, which is more than 100000' },
    ]);
  });

  it('with JSON that is nested too deep', async () => {
    for (const depth of [40, 5000, 90_000]) {
      const body = `{"deployment_name": "${deployment}", "query": "x", "runtime_overrides": {"variables": ${nested(depth)}}}`;
      const graph = `{"name": "deep", "configuration": ${nested(depth)}}`;
      for (const answer of [
        await post('/api/workflows/execute', body),
        await post('/api/workflows', graph),
      ]) {
        expect(answer).toMatchObject({ status: 400, body: { code: 'validation_failed' } });
        expect(answer.body.errors?.[0]).toMatchObject({
          pointer: expect.stringMatching(/(\/a){25}$/),
          detail: expect.stringContaining('nested deeper'),
        });
      }
    }
  });

  it('with an object of so many members that nobody could check them in time', async () => {
    const most = crowded(2000);
    expect((await post('/api/workflows', workflow('roomy', most))).status).toBe(201);
    for (const [body, pointer] of [
      [crowded(75_000), ''],
      [workflow('crowded', { ...most, more: 1 }), '/configuration/metadata'],
    ] as const) {
      const { status, body: problem } = await post('/api/workflows', body);
      expect([status, problem.code]).toEqual([400, 'validation_failed']);
      expect(problem.errors).toEqual([{ pointer, detail: 'has more than 2000 members' }]);
    }
  });

  it('with a body that is too large', async () => {
    const answer = await post('/api/workflows/execute', {
      deployment_name: deployment,
      query: 'x'.repeat(1_100_000),
    });
    expect(answer).toMatchObject({ status: 413, body: { code: 'payload_too_large' } });
  });

  it.each(['{', '', '[1]', '"text"', 'null', '{"deployment_name": }', '\u0000', '{"a": 1e999}'])(
    'with the body %j',
    async (body) => {
      const answer = await post('/api/workflows/execute', body);
      expect(answer.status).toBe(400);
      expect(answer.headers.get('content-type')).toMatch(/^application\/problem\+json/);
      expect(answer.body.detail).toMatch(/\w/);
      expect(answer.body.detail).not.toMatch(/at .*\.[jt]s:/);
    },
  );

  it('with a body that is not JSON by its own word', async () => {
    const answer = await post('/api/workflows/execute', 'deployment_name=x', {
      'Content-Type': 'application/x-www-form-urlencoded',
    });
    expect(answer).toMatchObject({ status: 415, body: { code: 'unsupported_media_type' } });
  });

  it('with fields of the wrong kind, naming each one', async () => {
    const answer = await post('/api/workflows/execute', {
      deployment_name: 7,
      chat_history: [{ actor: 'robot', content: 1 }, 'text'],
      runtime_overrides: [],
      include: ['everything'],
      surprise: true,
    });
    expect(answer).toMatchObject({ status: 400, body: { code: 'validation_failed' } });
    const pointers = answer.body.errors?.map(({ pointer }) => pointer);
    expect(pointers).toEqual(
      expect.arrayContaining([
        '/deployment_name',
        '/query',
        '/chat_history/0/actor',
        '/chat_history/0/content',
        '/runtime_overrides',
        '/include',
        '/surprise',
      ]),
    );
  });

  it('with an override that is not on the list', async () => {
    for (const runtime_overrides of [
      { system_prompt: 'obey' },
      { base_url: 'http://attacker' },
      { temperature: 'hot' },
      { model: 'nowhere/x' },
      { agents: { nobody: { temperature: 1 } } },
      { agents: { echo: { system_prompt: 'obey' } } },
    ]) {
      const answer = await post('/api/workflows/execute/stream', {
        deployment_name: deployment,
        query: 'x',
        runtime_overrides,
      });
      expect(answer).toMatchObject({ status: 400, body: { code: 'override_not_allowed' } });
      expect(answer.body.errors?.[0]?.pointer).toMatch(/^\/runtime_overrides/);
    }
  });

  it('with a graph that is huge or has cycles', async () => {
    const huge = await post('/api/workflows', graphOf(101, []));
    expect(huge).toMatchObject({ status: 422, body: { code: 'workflow_invalid' } });
    expect(huge.body.errors).toMatchObject([{ pointer: '/configuration/agents' }]);
    const tangled = await post('/api/workflows', graphOf(100, pairs(100, () => true).slice(0, 1001)));
    expect(tangled).toMatchObject({ status: 422, body: { code: 'workflow_invalid' } });
    expect(tangled.body.errors).toMatchObject([{ pointer: '/configuration/connections' }]);
    const everyone = pairs(30, (source, target) => source !== target);
    const ring = Array.from({ length: 100 }, (_, index): Pair => [index, (index + 1) % 100]);
    for (const connections of [everyone, ring, [...ring.slice(0, 99), [98, 0] satisfies Pair]]) {
      const answer = await post('/api/workflows', graphOf(100, connections));
      expect(answer).toMatchObject({ status: 422, body: { code: 'workflow_invalid' } });
      expect(answer.body.errors?.map(({ detail }) => detail).join()).toMatch(/in a cycle: a\d+ ->/);
    }
  });

  it('with addresses that are no ids', async () => {
    for (const id of ['x', '..%2f..%2fetc', '%00', "1' OR 1=1", '💥', 'x'.repeat(5000)]) {
      for (const path of ['', '/stream', '/steps', '/progress']) {
        const answer = await studio.json<Problem>(`/api/executions/${encodeURIComponent(id)}${path}`);
        expect(answer).toMatchObject({ status: 404, body: { code: 'execution_not_found' } });
      }
    }
    expect(await studio.json('/api/nothing/here')).toMatchObject({
      status: 404,
      body: { code: 'not_found' },
    });
    expect(await studio.json('/api/executions/%E0%A4%A')).toMatchObject({
      status: 400,
      body: { code: 'validation_failed' },
    });
    expect(await post('/api/workflows/execute', '{')).toMatchObject({
      status: 400,
      body: { code: 'invalid_json' },
    });
    expect((await studio.json('/api/executions?limit=0')).status).toBe(400);
    expect((await studio.json('/api/executions?status=x&cursor=1&from=yesterday')).status).toBe(400);
  });

  it.each(['+23:59', '-23:59'])('but every offset from UTC that a moment may have: %s', async (offset) => {
    for (const year of ['1000', '2026', '9999']) {
      const moment = encodeURIComponent(`${year}-01-31T12:00:00${offset}`);
      const answer = await studio.json(`/api/executions?from=${moment}&to=${moment}`);
      expect(answer).toMatchObject({ status: 200, body: { items: [] } });
    }
  });

  it('with a place in the stream that is none', async () => {
    const stream = await studio.stream({ deployment_name: deployment, query: 'x' });
    const id = stream.executionId;
    const { length } = await stream.frames();
    const other = '01900000-0000-7000-8000-00000000ffff';
    for (const lastEventId of [
      'x',
      '7',
      `${other}:1`,
      `${id}:${length + 1}`,
      `${id}:-1`,
      `${id}:1e3`,
      `${id}:99999999999`,
    ]) {
      const answer = await studio.json(`/api/executions/${id}/stream`, {
        headers: { 'Last-Event-ID': lastEventId },
      });
      expect(answer).toMatchObject({ status: 400, body: { code: 'invalid_cursor' } });
    }
    for (const after of ['x', '-1', '1.5', '99999999999999999999']) {
      expect((await studio.json(`/api/executions/${id}/stream?after=${after}`)).status).toBe(400);
    }
  });
});

it('a request id that could forge a log line or a header is replaced', async () => {
  const answer = await new Promise<string>((resolve, reject) => {
    const request = httpRequest(
      `${server.url}/health/live`,
      { headers: { 'X-Request-Id': 'a b"{}' } },
      (response) => {
        response.resume();
        resolve(String(response.headers['x-request-id']));
      },
    );
    request.on('error', reject).end();
  });
  expect(answer).toMatch(/^[0-9a-f-]{36}$/);
});

it('an unknown deployment and an inactive one are told apart before the stream starts', async () => {
  const unknown = await post('/api/workflows/execute/stream', { deployment_name: 'nobody', query: 'x' });
  expect(unknown).toMatchObject({ status: 404, body: { code: 'deployment_not_found' } });
  expect(unknown.headers.get('content-type')).toMatch(/^application\/problem\+json/);
  const stopped = await studio.deploy(echo());
  await studio.json(`/api/workflows/deployments/${stopped}/stop`, { method: 'POST' });
  const inactive = await post('/api/workflows/execute/stream', { deployment_name: stopped, query: 'x' });
  expect(inactive).toMatchObject({ status: 404, body: { code: 'deployment_not_found' } });
  expect(inactive.body.detail).not.toBe(unknown.body.detail.replace('nobody', stopped));
});

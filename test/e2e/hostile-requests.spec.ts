import { request as httpRequest } from 'node:http';
import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { startTestApp } from '../support/app.js';
import type { TestApp } from '../support/app.js';
import { Studio, echo } from '../support/studio.js';

interface Problem {
  code: string;
  status: number;
  detail: string;
  errors?: { pointer: string; detail: string }[];
}

let server: TestApp;
let studio: Studio;
let deployment: string;

beforeAll(async () => {
  server = await startTestApp();
  studio = new Studio(server.url);
  deployment = await studio.deploy(echo());
});
afterAll(() => server.close());

const post = (path: string, body: unknown, headers?: Record<string, string>) =>
  studio.json<Problem>(path, { method: 'POST', body, headers });
const nested = (depth: number) => '{"a":'.repeat(depth) + '1' + '}'.repeat(depth);

describe('a request that wants to break the server gets a 4xx that names the fault', () => {
  it.each(['__proto__', 'constructor', 'prototype'])('with the key %s at any depth', async (key) => {
    for (const variables of [
      `{"${key}": {"polluted": true}}`,
      `{"a": [{"b": {"${key}": {"polluted": true}}}]}`,
    ]) {
      const body = `{"deployment_name": "${deployment}", "query": "x", "runtime_overrides": {"variables": ${variables}}}`;
      for (const path of [
        '/api/workflows/execute',
        '/api/workflows/execute/stream',
        '/api/workflows/execute/async',
      ]) {
        const answer = await post(path, body);
        expect(answer.status).toBe(400);
        expect(answer.body.errors?.[0]?.pointer).toContain(`/${key}`);
      }
    }
    expect(({} as Record<string, unknown>).polluted).toBeUndefined();
  });

  it('with JSON that is nested too deep', async () => {
    for (const depth of [40, 5000, 100_000]) {
      const body = `{"deployment_name": "${deployment}", "query": "x", "runtime_overrides": {"variables": ${nested(depth)}}}`;
      expect(await post('/api/workflows/execute', body)).toMatchObject({
        status: 400,
        body: { code: 'validation_failed' },
      });
      const workflow = `{"name": "deep", "configuration": ${nested(depth)}}`;
      expect(await post('/api/workflows', workflow)).toMatchObject({
        status: 400,
        body: { code: 'validation_failed' },
      });
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

  it('with a graph that is huge or has cycles, and answers others meanwhile', async () => {
    const agents = Array.from({ length: 100 }, (_, index) => ({
      agent_id: `a${index}`,
      agent_type: 'template',
      config: { template: 'x' },
    }));
    const connections = Array.from({ length: 5000 }, (_, index) => ({
      source_agent_id: `a${index % 100}`,
      target_agent_id: `a${(index * 7 + 1) % 100}`,
    }));
    const huge = post('/api/workflows', { name: 'huge', configuration: { agents, connections } });
    const ring = agents.map(({ agent_id }, index) => ({
      source_agent_id: agent_id,
      target_agent_id: `a${(index + 1) % 100}`,
    }));
    const cyclic = post('/api/workflows', { name: 'ring', configuration: { agents, connections: ring } });
    expect((await fetch(`${server.url}/health/live`)).status).toBe(200);
    expect(await huge).toMatchObject({ status: 422, body: { code: 'workflow_invalid' } });
    const answer = await cyclic;
    expect(answer).toMatchObject({ status: 422, body: { code: 'workflow_invalid' } });
    expect(answer.body.errors?.map(({ detail }) => detail).join()).toMatch(/cycle/i);
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

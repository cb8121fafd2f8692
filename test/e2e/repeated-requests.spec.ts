import { randomUUID } from 'node:crypto';
import { beforeAll, describe, expect, it } from '@jest/globals';
import { faultsOfStream, textOf, until, upstreamAgent } from '../support/studio.js';
import { chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import { withStudio } from '../support/with-studio.js';

/** What the upstream waits for before it says its last word. */
let letGo: Promise<void>;
let release: () => void;
const server = withStudio({
  upstream: async (response) => {
    writeStream(response, chatDelta('one '), chatDelta('two '));
    await letGo;
    writeStream(response, chatDelta('three'), chatEnd());
    response.end();
  },
});
const { studio, upstream } = server;
let deployment: string;

beforeAll(async () => {
  deployment = await studio.deploy(upstreamAgent());
});

function hold(): void {
  letGo = new Promise((resolve) => (release = resolve));
}

const WAIT = '/api/workflows/execute';
const STREAM = '/api/workflows/execute/stream';
const ASYNC = '/api/workflows/execute/async';

const keyed = (key: string) => ({ 'Idempotency-Key': key });

async function countOf(query: string): Promise<number> {
  const sql = 'SELECT 1 FROM execution WHERE strpos(input::text, $1) > 0';
  const rows = await server.database.query(sql, [query]);
  return rows.length;
}

const callsOf = (query: string) =>
  upstream.requests.filter((request) => JSON.stringify(request.body.messages).includes(query)).length;

describe('a request with an Idempotency-Key', () => {
  it('runs once, though a hundred of them arrive at the same moment', async () => {
    hold();
    const query = randomUUID();
    const body = { deployment_name: deployment, query };
    const headers = keyed(query);
    const asked = Array.from({ length: 100 }, async (_, index) => {
      if (index % 3 === 0) {
        const { status, body: result } = await studio.json<{ execution_id: string }>(ASYNC, {
          method: 'POST',
          body,
          headers,
        });
        return { status, id: result.execution_id };
      }
      if (index % 3 === 1) {
        const { status, body: result } = await studio.json<{ execution_id: string; response: string }>(WAIT, {
          method: 'POST',
          body,
          headers,
        });
        expect(result.response).toBe('one two three');
        return { status, id: result.execution_id };
      }
      const stream = await studio.stream(body, { headers });
      const frames = await stream.frames();
      expect(faultsOfStream(frames, stream.executionId)).toEqual([]);
      expect(textOf(frames)).toBe('one two three');
      return { status: stream.status, id: stream.executionId };
    });
    await until(() => callsOf(query) > 0);
    release();
    const answers = await Promise.all(asked);
    expect(new Set(answers.map(({ id }) => id)).size).toBe(1);
    expect(answers.map(({ status }) => status)).toEqual(
      answers.map((_, index) => (index % 3 === 0 ? 202 : 200)),
    );
    expect(await countOf(query)).toBe(1);
    expect(callsOf(query)).toBe(1);
  });

  it('gets the same execution after its end, also when the deployment was stopped since', async () => {
    hold();
    release();
    const name = await studio.deploy(upstreamAgent());
    const body = { deployment_name: name, query: randomUUID() };
    const headers = keyed(randomUUID());
    const first = await studio.json<{ execution_id: string }>(WAIT, { method: 'POST', body, headers });
    await studio.json(`/api/workflows/deployments/${name}/stop`, { method: 'POST' });

    expect((await studio.json(WAIT, { method: 'POST', body, headers })).body).toEqual(first.body);
    const accepted = await studio.json(ASYNC, { method: 'POST', body, headers });
    expect(accepted).toMatchObject({
      status: 202,
      body: { execution_id: first.body.execution_id, status: 'completed' },
    });
    const stream = await studio.stream(body, { headers });
    expect(stream.executionId).toBe(first.body.execution_id);
    expect(faultsOfStream(await stream.frames(), first.body.execution_id)).toEqual([]);
    expect(callsOf(body.query)).toBe(1);
    const other = await studio.json(WAIT, { method: 'POST', body, headers: keyed(randomUUID()) });
    expect(other).toMatchObject({ status: 404, body: { code: 'deployment_not_found' } });
  });

  it('is the same whatever the order of its members, and another one if anything else differs', async () => {
    hold();
    release();
    const query = randomUUID();
    const body = {
      deployment_name: deployment,
      query,
      runtime_overrides: { variables: { a: 1, b: { c: [1, 2], d: '\ud800' } }, temperature: 0 },
    };
    const headers = keyed(randomUUID());
    const first = await studio.json<{ execution_id: string }>(ASYNC, { method: 'POST', body, headers });
    const turned = `{"runtime_overrides": {"temperature": 0.0, "variables": {"b": {"d": "\\ud800", "c": [1, 2]}, "a": 1}},
      "query": "${query}", "deployment_name": "${deployment}"}`;
    const second = await studio.json(ASYNC, { method: 'POST', body: turned, headers });
    expect(second).toMatchObject({ status: 202, body: { execution_id: first.body.execution_id } });

    const others = [
      { ...body, query: 'something else' },
      { ...body, environment: 'production' },
      { ...body, include: ['progress'] },
      { ...body, chat_history: [{ actor: 'user', content: 'before' }] },
      { ...body, runtime_overrides: { ...body.runtime_overrides, variables: { a: 1, b: { c: [2, 1] } } } },
      { ...body, deployment_name: await studio.deploy(upstreamAgent()) },
    ];
    for (const other of others) {
      for (const path of [WAIT, STREAM, ASYNC]) {
        const answer = await studio.json<{ detail: string }>(path, { method: 'POST', body: other, headers });
        expect(answer).toMatchObject({ status: 422, body: { code: 'idempotency_key_reused' } });
        expect(answer.body.detail).toContain(first.body.execution_id);
      }
    }
    expect(await countOf('something else')).toBe(0);
  });

  it('is refused if the key is empty, too long or no plain text', async () => {
    const query = randomUUID();
    const body = { deployment_name: deployment, query };
    for (const key of ['', 'x'.repeat(256), 'caf\u00e9']) {
      const answer = await studio.json(ASYNC, { method: 'POST', body, headers: keyed(key) });
      expect(answer).toMatchObject({ status: 400, body: { code: 'idempotency_key_invalid' } });
    }
    expect(await countOf(query)).toBe(0);
    hold();
    release();
    const longest = await studio.json(ASYNC, { method: 'POST', body, headers: keyed('x'.repeat(255)) });
    expect(longest.status).toBe(202);
  });
});

describe('a POST that is repeated with Last-Event-ID', () => {
  it('goes on with the stream that it began, and never runs again', async () => {
    hold();
    const query = randomUUID();
    const body = { deployment_name: deployment, query };
    const begun = await studio.stream(body);
    const head = await begun.take(2);
    const id = begun.executionId;

    const headers = { 'Last-Event-ID': head[1]?.id ?? '' };
    const again = await studio.stream(body, { headers });
    expect(again.headers.get('location')).toBe(`/api/executions/${id}/stream`);
    expect(again.executionId).toBe(id);
    release();
    const rest = await again.frames();
    expect(faultsOfStream([...head, ...rest], id)).toEqual([]);
    const whole = await (await studio.follow(id)).frames();
    expect([...head, ...rest].map(({ data }) => data)).toEqual(whole.map(({ data }) => data));

    const replayed = await (await studio.stream(body, { headers })).frames();
    expect(replayed.map(({ data }) => data)).toEqual(rest.map(({ data }) => data));
    const done = await studio.stream(body, { headers: { 'Last-Event-ID': whole.at(-1)?.id ?? '' } });
    expect(done.status).toBe(204);
    expect(await countOf(query)).toBe(1);
    expect(callsOf(query)).toBe(1);
  });

  it('is refused, and runs nothing, if the event is not of this request', async () => {
    hold();
    release();
    const query = randomUUID();
    const body = { deployment_name: deployment, query };
    const stream = await studio.stream(body);
    const id = stream.executionId;
    const last = (await stream.frames()).length;
    const post = (changed: object, eventId: string) =>
      studio.json(STREAM, {
        method: 'POST',
        body: { ...body, ...changed },
        headers: { 'Last-Event-ID': eventId },
      });

    const cursor = { status: 400, body: { code: 'invalid_cursor' } };
    expect(await post({ query: 'a new question' }, `${id}:1`)).toMatchObject(cursor);
    expect(await post({ deployment_name: await studio.deploy(upstreamAgent()) }, `${id}:1`)).toMatchObject(
      cursor,
    );
    expect(await post({}, `${id}:${last + 1}`)).toMatchObject(cursor);
    for (const garbage of ['7', `${id}`, `${id}:`, `${id}:-1`, 'x:1', `${id}:1:1`]) {
      expect(await post({}, garbage)).toMatchObject(cursor);
    }
    const unknown = await post({}, `${randomUUID()}:1`);
    expect(unknown).toMatchObject({ status: 404, body: { code: 'execution_not_found' } });
    expect(await countOf(query)).toBe(1);
    expect(await countOf('a new question')).toBe(0);
  });
});

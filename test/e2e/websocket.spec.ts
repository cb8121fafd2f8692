import { randomUUID } from 'node:crypto';
import { afterEach, beforeAll, describe, expect, it } from '@jest/globals';
import { rounds } from '../support/effort.js';
import { EventStream, echo, faultsOfStream, textOf, until, upstreamAgent } from '../support/studio.js';
import type { Frame } from '../support/studio.js';
import { chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import { withStudio } from '../support/with-studio.js';
import { WsClient, frameOf } from '../support/ws-client.js';

/** Lets the upstream's answer to a query come to its end. */
const finish = new Map<string, () => void>();
const app = withStudio({
  upstream: (response, { query }) => {
    writeStream(response, chatDelta('so far'));
    finish.set(query, () => {
      writeStream(response, chatDelta(' so good'), chatEnd());
      response.end();
    });
  },
  env: { WS_MAX_SUBSCRIPTIONS: '5' },
});
const { studio, upstream } = app;
let deployment: string;
let conducted: string;

beforeAll(async () => {
  deployment = await studio.deploy(echo());
  conducted = await studio.deploy(upstreamAgent(), { disconnect_grace_ms: 100 });
});

const clients: WsClient[] = [];
afterEach(async () => {
  await Promise.all(clients.splice(0).map((client) => client.close()));
  await until(async () => (await studio.metric('agent_studio_open_websockets')) === 0);
  expect(await studio.metric('agent_studio_websocket_subscriptions')).toBe(0);
});

async function open(): Promise<WsClient> {
  const client = await WsClient.open(app.url);
  clients.push(client);
  return client;
}

const linesOf = (frames: Frame[]) => frames.map(({ id, data }) => `${id} ${data}`);
const UNKNOWN = '01900000-0000-7000-8000-00000000ffff';

/** Executes what ends when it is told to, and resolves when its first text has come. */
async function begin(client: WsClient, fields: object = {}) {
  const query = randomUUID();
  const begun = await client.execute({ deployment_name: conducted, query, ...fields });
  await client.until(() => client.frames(begun.id).length >= 2);
  return { ...begun, finish: () => finish.get(query)?.() };
}

/** The whole stream of an execution that has ended. */
async function ended(): Promise<{ executionId: string; frames: Frame[] }> {
  const stream = await studio.stream({ deployment_name: deployment, query: 'a few words to be said' });
  return { executionId: stream.executionId, frames: await stream.frames() };
}

describe('execute', () => {
  it('sends what an SSE client of the same execution gets, to the byte, between accepted and end', async () => {
    const client = await open();
    const { id, executionId } = await client.execute({
      deployment_name: deployment,
      query: 'hällo 🌍\n\u2028',
    });
    const sse = await (await studio.follow(executionId)).frames();
    const frames = await client.whole(id);
    expect(faultsOfStream(frames, executionId)).toEqual([]);
    expect(linesOf(frames)).toEqual(linesOf(sse));
    const events = client.answers.map(({ event }) => event);
    expect(events).toEqual(['accepted', ...frames.map(() => 'chunk'), 'end']);
    expect(client.answers.at(-1)?.raw).toBe(
      JSON.stringify({ event: 'end', id, data: { execution_id: executionId } }),
    );
    const { body } = await studio.json<object>(`/api/executions/${executionId}`);
    expect(body).toMatchObject({ ...client.answers[0]?.data, status: 'completed' });
  });

  it('with the same key, on whatever socket, runs once', async () => {
    const [first, second] = [await open(), await open()];
    const request = { deployment_name: conducted, query: randomUUID(), idempotency_key: randomUUID() };
    const calls = upstream.requests.length;
    const [one, other] = await Promise.all([first.execute(request), second.execute(request)]);
    expect(other.executionId).toBe(one.executionId);
    const again = await first.ask('execute', request);
    expect(again).toMatchObject({ event: 'accepted', data: { execution_id: one.executionId } });
    const refused = await first.answer(({ id, event }) => id === again.id && event === 'error');
    expect(refused.data).toMatchObject({ code: 'already_subscribed', status: 409 });
    await first.until(() => finish.has(request.query));
    finish.get(request.query)?.();
    const frames = await first.whole(one.id);
    expect(faultsOfStream(frames, one.executionId)).toEqual([]);
    expect(linesOf(await second.whole(other.id))).toEqual(linesOf(frames));
    expect(upstream.requests.length).toBe(calls + 1);
    const reused = await first.ask('execute', { ...request, query: 'another one' });
    expect(reused).toMatchObject({ event: 'error', data: { code: 'idempotency_key_reused', status: 422 } });
  });

  it('with on_disconnect "cancel" is cancelled when its socket has gone, and not while another one follows', async () => {
    const [first, second] = [await open(), await open()];
    const { executionId } = await begin(first, { on_disconnect: 'cancel' });
    const follow = await second.ask('subscribe', { execution_id: executionId });
    first.reset();
    await until(async () => {
      const { body } = await studio.json<{ subscribers: number }>(`/api/executions/${executionId}`);
      return body.subscribers === 1;
    });
    expect(second.answers.some(({ event }) => event === 'end')).toBe(false);
    await second.ask('unsubscribe', { execution_id: executionId });
    await until(async () => {
      const { body } = await studio.json<{ status: string }>(`/api/executions/${executionId}`);
      return body.status === 'cancelled';
    });
    expect(follow.event).toBe('subscribed');
  });
});

describe('subscribe', () => {
  it('goes on right behind any chunk', async () => {
    const client = await open();
    const { executionId, frames } = await ended();
    expect(frames.length).toBeGreaterThan(5);
    for (let after = 0; after < frames.length; after++) {
      const answer = await client.ask('subscribe', { execution_id: executionId.toUpperCase(), after });
      expect(answer).toMatchObject({ event: 'subscribed', data: { execution_id: executionId, after } });
      const rest = await client.whole(String(answer.id));
      expect(linesOf(rest)).toEqual(linesOf(frames.slice(after)));
    }
  });

  it('behind the terminal chunk says at once that nothing is left', async () => {
    const client = await open();
    const { executionId, frames } = await ended();
    const { id } = await client.ask('subscribe', { execution_id: executionId, after: frames.length });
    expect(await client.whole(String(id))).toEqual([]);
    expect(client.answers.map(({ event }) => event)).toEqual(['subscribed', 'end']);
  });

  it('to what the socket follows already is refused, and possible again after unsubscribe and after the end', async () => {
    const client = await open();
    const run = await begin(client);
    const target = { execution_id: run.executionId };
    const refused = await client.ask('subscribe', target);
    expect(refused).toMatchObject({ event: 'error', data: { code: 'already_subscribed' } });
    await client.ask('unsubscribe', target);
    const again = await client.ask('subscribe', target);
    expect(again.event).toBe('subscribed');
    run.finish();
    const frames = await client.whole(String(again.id));
    expect(textOf(frames)).toBe('so far so good');
    expect((await client.ask('subscribe', target)).event).toBe('subscribed');
  });

  it('beyond the limit is refused, and possible again when one of the others has ended', async () => {
    const client = await open();
    const runs = await Promise.all(Array.from({ length: 5 }, () => begin(client)));
    const { executionId } = await ended();
    for (const [event, data] of [
      ['subscribe', { execution_id: executionId }],
      ['execute', { deployment_name: deployment, query: 'x' }],
    ] as const) {
      const refused = await client.ask(event, data);
      expect(refused).toMatchObject({
        event: 'error',
        data: { code: 'too_many_subscriptions', status: 429 },
      });
    }
    runs[0]?.finish();
    await client.whole(runs[0]?.id ?? '');
    expect((await client.ask('subscribe', { execution_id: executionId })).event).toBe('subscribed');
  });

  it('and unsubscribe, sent without waiting, are carried out in their order', async () => {
    const client = await open();
    const runner = await open();
    const { executionId } = await begin(runner);
    const target = { execution_id: executionId };
    for (let round = 0; round < rounds(20, 5); round++) {
      const ids = ['subscribe', 'unsubscribe', 'subscribe', 'unsubscribe'].map((event) =>
        client.send(event, target),
      );
      await client.answer(({ id }) => id === ids.at(-1));
      const events = ids.map((id) => client.answers.find((answer) => answer.id === id)?.event);
      expect(events).toEqual(['subscribed', 'unsubscribed', 'subscribed', 'unsubscribed']);
    }
    expect(await studio.metric('agent_studio_websocket_subscriptions')).toBe(1); // the runner's
  });
});

describe('unsubscribe', () => {
  it('lets nothing of the stream follow its answer, and the execution go on', async () => {
    const client = await open();
    const run = await begin(client);
    const { id } = await client.ask('unsubscribe', { execution_id: run.executionId });
    run.finish();
    await (await studio.follow(run.executionId)).frames();
    await client.ask('ping');
    const after = client.answers.slice(client.answers.findIndex((answer) => answer.id === id) + 1);
    expect(after.map(({ event }) => event)).toEqual(['pong']);
  });

  it('of what is not followed is no error, as the stream may just have ended', async () => {
    const client = await open();
    const answer = await client.ask('unsubscribe', { execution_id: UNKNOWN });
    expect(answer).toMatchObject({ event: 'unsubscribed', data: { execution_id: UNKNOWN } });
  });
});

describe('a batch', () => {
  const start = async (items: object[], fields: object = {}) => {
    const { body } = await studio.json<{ batch_id: string }>('/api/workflows/execute/batch', {
      method: 'POST',
      body: { deployment_name: deployment, items, ...fields },
    });
    return body.batch_id;
  };

  it('is followed as over SSE, to the byte, and goes on right behind any of its chunks', async () => {
    const client = await open();
    const batchId = await start(Array.from({ length: 12 }, (_, index) => ({ query: `item ${index}` })));
    const begun = await client.ask('subscribe', { batch_id: batchId });
    expect(begun).toMatchObject({ event: 'subscribed', data: { batch_id: batchId, after: 0 } });
    const { data } = await client.answer(({ event }) => event === 'end');
    expect(data).toEqual({ batch_id: batchId });
    const chunks = client.answers.filter(({ event }) => event === 'chunk');
    const lines = chunks.map(
      ({ after, raw }) => `${batchId}:${after} ${raw.slice(raw.indexOf('"data":') + 7, -1)}`,
    );
    const sse = new EventStream(await fetch(`${app.url}/api/batches/${batchId}/stream`));
    expect(lines).toEqual(linesOf(await sse.frames()));
    for (const after of [1, 7, lines.length - 1, lines.length]) {
      const { id } = await client.ask('subscribe', { batch_id: batchId, after });
      await client.answer((answer) => answer.event === 'end' && answer.id === id);
      const rest = client.answers.filter((answer) => answer.event === 'chunk' && answer.id === id);
      expect(rest.map(({ after: at }) => at)).toEqual(
        lines.slice(after).map((_, index) => after + index + 1),
      );
    }
  });

  it('is cancelled, and its stream comes to its end', async () => {
    const client = await open();
    const batchId = await start([{ query: 'a' }, { query: 'b' }], { deployment_name: conducted });
    const { id } = await client.ask('subscribe', { batch_id: batchId });
    const answer = await client.ask('cancel', { batch_id: batchId });
    expect(answer).toMatchObject({ event: 'cancelled', data: { batch_id: batchId, status: 'cancelled' } });
    await client.answer(({ event, id: of }) => event === 'end' && of === id);
    const last = client.answers.findLast(({ event }) => event === 'chunk');
    expect(last?.data).toMatchObject({ status: 'cancelled', batch_id: batchId });
  });
});

describe('a deployment', () => {
  it('is watched as over SSE: a snapshot, then each change once, and on from any of them', async () => {
    const client = await open();
    const name = await studio.deploy(upstreamAgent());
    const { id } = await client.ask('subscribe', { deployment_name: name });
    const snapshot = await client.answer(({ event }) => event === 'status');
    expect(snapshot).toMatchObject({
      id,
      after: snapshot.data['sequence'],
      data: { type: 'snapshot', running: 0 },
    });
    const sse = await fetch(`${app.url}/api/deployments/${name}/events?after=${snapshot.after}`);
    const events = sse.body?.pipeThrough(new TextDecoderStream());

    const run = await begin(client, { deployment_name: name });
    run.finish();
    const statuses = () => client.answers.filter(({ event }) => event === 'status').slice(1);
    await client.until(() => statuses().length === 3);
    expect(statuses().map(({ data }) => data['status'])).toEqual(['queued', 'running', 'completed']);
    let received = '';
    for await (const text of events ?? []) {
      received += text;
      if (received.includes('completed') && received.endsWith('\n\n')) break;
    }
    const lines = received.split('\n').filter((line) => line.startsWith('data: '));
    expect(statuses().map(({ raw }) => `data: ${raw.slice(raw.indexOf('"data":') + 7, -1)}`)).toEqual(lines);

    const second = await open();
    const again = await second.ask('subscribe', { deployment_name: name, after: statuses()[0]?.after });
    await second.until(() => second.answers.filter(({ event }) => event === 'status').length === 2);
    const resumed = second.answers.filter(({ event, id: to }) => event === 'status' && to === again.id);
    expect(resumed.map(({ data }) => data)).toEqual(
      statuses()
        .slice(1)
        .map(({ data }) => data),
    );
    expect((await client.ask('unsubscribe', { deployment_name: name })).event).toBe('unsubscribed');
  });
});

it('a stream whose chunks are deleted while it waits is told, and does not hang for ever', async () => {
  const client = await open();
  const { executionId } = await begin(client);
  const follower = await open();
  const { id } = await follower.ask('subscribe', { execution_id: executionId });
  await follower.until(() => follower.frames(String(id)).length >= 2);
  await studio.json(`/api/executions/${executionId}/cancel`, { method: 'POST' });
  const frames = await follower.whole(String(id));
  expect(frames.at(-1)?.chunk.status).toBe('cancelled');
  await app.database.query('DELETE FROM execution_chunk WHERE execution_id = $1', [executionId]);
  const refused = await follower.ask('subscribe', { execution_id: executionId, after: 1 });
  expect(refused.data).toMatchObject({ code: 'log_expired', status: 410 });
  expect(frames.every((frame) => frame.id.startsWith(executionId))).toBe(true);
  expect(frameOf(follower.answers.find(({ event }) => event === 'chunk') ?? refused)).toEqual(frames[0]);
});

import { afterAll, afterEach, beforeAll, describe, expect, it } from '@jest/globals';
import { echo, until } from '../support/studio.js';
import { withStudio } from '../support/with-studio.js';
import { WsClient } from '../support/ws-client.js';

const UNKNOWN = '01900000-0000-7000-8000-00000000ffff';
// Before the server closes.
afterAll(() => client.close());
const app = withStudio();
const { studio } = app;
let deployment: string;
let client: WsClient;
/** An execution that has ended. */
let executionId: string;

beforeAll(async () => {
  deployment = await studio.deploy(echo());
  const stream = await studio.stream({ deployment_name: deployment, query: 'x' });
  executionId = stream.executionId;
  await stream.frames();
  client = await WsClient.open(app.url);
});
afterEach(() => void (client.answers.length = 0));

describe('what is refused', () => {
  const RUN = '/api/workflows/execute/stream';
  const run = { deployment_name: 'DEPLOYMENT', query: 'x' };
  /** `path` is the HTTP request for the same, if there is one; `pointer` is that of a fault, into `data`. */
  interface Refusal {
    event: string;
    data?: object;
    path?: string;
    code: string;
    pointer?: string;
  }
  const refusals: Refusal[] = [
    {
      event: 'execute',
      data: { query: 'x' },
      path: RUN,
      code: 'validation_failed',
      pointer: '/deployment_name',
    },
    { event: 'execute', path: RUN, code: 'validation_failed', pointer: '/deployment_name' },
    { event: 'execute', data: { ...run, more: 1 }, path: RUN, code: 'validation_failed', pointer: '/more' },
    {
      event: 'execute',
      data: { ...run, deployment_name: 'nobody' },
      path: RUN,
      code: 'deployment_not_found',
    },
    {
      event: 'execute',
      data: { ...run, runtime_overrides: { key: 1 } },
      path: RUN,
      code: 'override_not_allowed',
      pointer: '/runtime_overrides/key',
    },
    {
      event: 'execute',
      data: { ...run, chat_history: [{ actor: 'me', content: '' }] },
      path: RUN,
      code: 'validation_failed',
      pointer: '/chat_history/0/actor',
    },
    { event: 'execute', data: { ...run, idempotency_key: '' }, code: 'idempotency_key_invalid' },
    {
      event: 'subscribe',
      data: { execution_id: UNKNOWN },
      path: `/api/executions/${UNKNOWN}/stream`,
      code: 'execution_not_found',
    },
    {
      event: 'subscribe',
      data: { execution_id: 'x' },
      path: '/api/executions/x/stream',
      code: 'execution_not_found',
    },
    {
      event: 'subscribe',
      data: { execution_id: 'EXECUTION', after: 10_000 },
      path: '/api/executions/EXECUTION/stream?after=10000',
      code: 'invalid_cursor',
    },
    {
      event: 'subscribe',
      data: { execution_id: 'EXECUTION', after: -1 },
      path: '/api/executions/EXECUTION/stream?after=-1',
      code: 'validation_failed',
      pointer: '/after',
    },
    {
      event: 'subscribe',
      data: { execution_id: 'EXECUTION', after: '1' },
      code: 'validation_failed',
      pointer: '/after',
    },
    {
      event: 'subscribe',
      data: { deployment_name: 'nobody' },
      path: '/api/deployments/nobody/events',
      code: 'deployment_not_found',
    },
    { event: 'subscribe', data: {}, code: 'validation_failed', pointer: '' },
    {
      event: 'subscribe',
      data: { execution_id: UNKNOWN, deployment_name: 'x' },
      code: 'validation_failed',
      pointer: '',
    },
    {
      event: 'subscribe',
      data: { execution_id: UNKNOWN, environment: 'x' },
      code: 'validation_failed',
      pointer: '/environment',
    },
    // What a client sends for what it does not have is no position and no name.
    {
      event: 'subscribe',
      data: { execution_id: 'EXECUTION', after: null },
      code: 'validation_failed',
      pointer: '/after',
    },
    { event: 'subscribe', data: { execution_id: null }, code: 'validation_failed', pointer: '/execution_id' },
    { event: 'subscribe', data: { batch_id: null }, code: 'validation_failed', pointer: '/batch_id' },
    {
      event: 'subscribe',
      data: { deployment_name: null },
      code: 'validation_failed',
      pointer: '/deployment_name',
    },
    {
      event: 'subscribe',
      data: { deployment_name: 'DEPLOYMENT', environment: null },
      code: 'validation_failed',
      pointer: '/environment',
    },
    {
      event: 'subscribe',
      data: { deployment_name: 'DEPLOYMENT', status: null },
      code: 'validation_failed',
      pointer: '/status',
    },
    { event: 'unsubscribe', data: { batch_id: null }, code: 'validation_failed', pointer: '/batch_id' },
    { event: 'cancel', data: { execution_id: null }, code: 'validation_failed', pointer: '/execution_id' },
    {
      event: 'execute',
      data: { ...run, idempotency_key: null },
      code: 'validation_failed',
      pointer: '/idempotency_key',
    },
    {
      event: 'subscribe',
      data: { deployment_name: 'DEPLOYMENT', status: 'completed' },
      code: 'validation_failed',
      pointer: '/status',
    },
    {
      event: 'subscribe',
      data: { execution_id: 'EXECUTION', status: ['completed'] },
      code: 'validation_failed',
      pointer: '/status',
    },
    { event: 'unsubscribe', data: {}, code: 'validation_failed', pointer: '' },
    {
      event: 'cancel',
      data: { execution_id: UNKNOWN },
      path: `/api/executions/${UNKNOWN}/cancel`,
      code: 'execution_not_found',
    },
    {
      event: 'cancel',
      data: { execution_id: 'EXECUTION' },
      path: '/api/executions/EXECUTION/cancel',
      code: 'execution_finished',
    },
    { event: 'cancel', data: {}, code: 'validation_failed', pointer: '' },
    {
      event: 'subscribe',
      data: { batch_id: UNKNOWN },
      path: `/api/batches/${UNKNOWN}/stream`,
      code: 'batch_not_found',
    },
    {
      event: 'cancel',
      data: { batch_id: UNKNOWN },
      path: `/api/batches/${UNKNOWN}/cancel`,
      code: 'batch_not_found',
    },
    { event: 'ping', data: { more: 1 }, code: 'validation_failed', pointer: '/more' },
  ];

  /** The problem that HTTP answers the same with. */
  async function overHttp(event: string, path: string, data: object = {}) {
    if (event === 'subscribe') return (await studio.json<Record<string, unknown>>(path)).body;
    const body = event === 'cancel' ? undefined : data;
    return (await studio.json<Record<string, unknown>>(path, { method: 'POST', body })).body;
  }

  it.each(refusals)('$event $data is told as by HTTP, and the socket lives on', async (refusal) => {
    const text = JSON.stringify(refusal)
      .replaceAll('EXECUTION', executionId)
      .replaceAll('DEPLOYMENT', deployment);
    const { event, data, path, code, pointer } = JSON.parse(text) as Refusal;
    const { event: kind, data: problem } = await client.ask(event, data);
    expect(kind).toBe('error');
    expect(problem).toMatchObject({ code, instance: '/api/ws', request_id: expect.any(String) });
    const errors = problem['errors'] as { pointer: string }[] | undefined;
    if (pointer !== undefined) expect(errors?.map((fault) => fault.pointer)).toContain(`/data${pointer}`);
    if (path !== undefined) {
      const { type, title, status, detail } = await overHttp(event, path, data);
      expect(problem).toMatchObject({ type, title, status, detail, code });
    }
    expect((await client.ask('ping')).event).toBe('pong');
  });

  it('is told with the id that the message had, be it a text, a number or none', async () => {
    for (const id of ['"a \\u2028 \\ud800"', '0', '-1.5e3', undefined]) {
      const member = id === undefined ? '' : `,"id":${id}`;
      client.answers.length = 0;
      client.sendText(`{"event":"ping"${member}}`);
      client.sendText(`{"event":"cancel"${member}}`);
      client.sendText(`{"event":"dance"${member}}`);
      await client.until(() => client.answers.length === 3);
      const expected = id === undefined ? undefined : (JSON.parse(id) as unknown);
      for (const answer of client.answers) expect(answer.id).toEqual(expected);
      expect(client.answers.map(({ event }) => event).toSorted()).toEqual(['error', 'error', 'pong']);
    }
  });

  describe('by the queue', () => {
    const full = withStudio({ env: { ROLE: 'api', MAX_QUEUED: '1' } });

    it('comes with the seconds to wait, which HTTP says in a header', async () => {
      const waiting = await WsClient.open(full.url);
      try {
        const name = await full.studio.deploy(echo());
        const refused = await until(async () => {
          const answer = await waiting.ask('execute', { deployment_name: name, query: 'x' });
          return answer.event === 'error' ? answer : undefined;
        });
        expect(refused.data).toMatchObject({
          code: 'queue_full',
          status: 429,
          retry_after: expect.any(Number),
        });
      } finally {
        await waiting.close();
      }
    });
  });
});

describe('a stream that was named otherwise', () => {
  const quiet = { status: ['cancelled'] };

  it('is the same one: a deployment with and without its environment', async () => {
    const named = { deployment_name: deployment, environment: 'production' };
    const subscribed = await client.ask('subscribe', { deployment_name: deployment, ...quiet });
    expect(subscribed).toMatchObject({ event: 'subscribed', data: named });
    expect(await client.ask('subscribe', { ...named, ...quiet })).toMatchObject({
      data: { code: 'already_subscribed' },
    });
    for (const name of [named, { deployment_name: deployment }]) {
      expect((await client.ask('unsubscribe', name)).event).toBe('unsubscribed');
      expect((await client.ask('subscribe', { ...named, ...quiet })).event).toBe('subscribed');
    }
    expect((await client.ask('unsubscribe', named)).event).toBe('unsubscribed');
  });

  it('is ended after it was begun, in whatever case its id is written', async () => {
    const id = client.send('subscribe', { execution_id: executionId.toUpperCase() });
    const end = client.send('unsubscribe', { execution_id: executionId });
    await client.answer((answer) => answer.id === end);
    await client.ask('ping');
    const events = client.answers.filter((answer) => answer.id === id || answer.id === end);
    expect(events.at(-1)?.event).toBe('unsubscribed');
  });
});

import { randomUUID } from 'node:crypto';
import { connect } from 'node:net';
import { beforeAll, describe, expect, it } from '@jest/globals';
import { Subscribers } from '../../src/executions/subscribers.js';
import { itInFull } from '../support/effort.js';
import { faultsOfStream, textOf, until, upstreamAgent } from '../support/studio.js';
import { chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import { withStudio } from '../support/with-studio.js';

interface ExecutionState {
  status: string;
  response?: string;
  subscribers: number;
  disconnected_at?: string;
}

/** Lets the upstream's answer to a query come to its end. */
const finish = new Map<string, () => void>();
const server = withStudio({
  upstream: (response, { query }) => {
    writeStream(response, chatDelta('so far'));
    finish.set(query, () => {
      writeStream(response, chatDelta(' so good'), chatEnd());
      response.end();
    });
  },
});
const { studio, upstream } = server;
let deployment: string;
let impatient: string;

beforeAll(async () => {
  deployment = await studio.deploy(upstreamAgent());
  impatient = await studio.deploy(upstreamAgent(), { disconnect_grace_ms: 300 });
});

const stateOf = async (id: string) => (await studio.json<ExecutionState>(`/api/executions/${id}`)).body;

const stateWith = (id: string, condition: (state: ExecutionState) => boolean) =>
  until(async () => {
    const state = await stateOf(id);
    return condition(state) ? state : undefined;
  });

/** The execution of a query whose client can't tell its id. */
const executionOf = (query: string) =>
  until(async () => {
    const sql = "SELECT execution_id FROM execution WHERE input->>'query' = $1";
    return (await server.database.query<{ execution_id: string }>(sql, [query]))[0]?.execution_id;
  });

describe('the clients of an execution', () => {
  it('are counted as they come and go, and the moment is kept when the last one left', async () => {
    const query = randomUUID();
    const first = new AbortController();
    const second = new AbortController();
    const begun = await studio.stream({ deployment_name: deployment, query }, { signal: first.signal });
    const id = begun.executionId;
    await studio.follow(id, undefined, { signal: second.signal });
    expect(await stateWith(id, ({ subscribers }) => subscribers === 2)).not.toHaveProperty('disconnected_at');
    first.abort();
    expect(await stateWith(id, ({ subscribers }) => subscribers === 1)).not.toHaveProperty('disconnected_at');
    second.abort();
    const alone = await stateWith(id, ({ subscribers }) => subscribers === 0);
    expect(alone).toMatchObject({ status: 'running', disconnected_at: expect.any(String) });

    const back = await studio.follow(id);
    expect(await stateWith(id, ({ subscribers }) => subscribers === 1)).not.toHaveProperty('disconnected_at');
    finish.get(query)?.();
    expect(textOf(await back.frames())).toBe('so far so good');
    const ended = await stateWith(id, ({ subscribers }) => subscribers === 0);
    expect(ended.status).toBe('completed');
    expect(ended).not.toHaveProperty('disconnected_at');
  });

  itInFull('are forgotten when the process that counted them has died', async () => {
    const query = randomUUID();
    const stream = await studio.stream({ deployment_name: deployment, query });
    const id = stream.executionId;
    await stateWith(id, ({ subscribers }) => subscribers === 1);
    const dead = randomUUID();
    await server.database.query(`INSERT INTO server_process VALUES ($1, now() - interval '1 minute')`, [
      dead,
    ]);
    await server.database.query('INSERT INTO execution_subscriber VALUES ($1, $2, 4)', [id, dead]);
    expect((await stateOf(id)).subscribers).toBe(5);
    await server.app.get(Subscribers).forgetDead();
    expect((await stateOf(id)).subscribers).toBe(1);

    // A process that was only taken for dead, as after a pause, counts its clients anew.
    await server.database.query('UPDATE execution_subscriber SET count = 0, left_at = now()');
    await server.database.query('DELETE FROM server_process');
    expect(await stateOf(id)).toMatchObject({ subscribers: 0, disconnected_at: expect.any(String) });
    expect(await stateWith(id, ({ subscribers }) => subscribers === 1)).not.toHaveProperty('disconnected_at');
    finish.get(query)?.();
    await stream.frames();
  });
});

describe('an execution that lost its clients', () => {
  it('goes on to its end where nothing else was asked for', async () => {
    for (const on_disconnect of [undefined, 'continue']) {
      const query = randomUUID();
      const client = new AbortController();
      const body = { deployment_name: impatient, query, on_disconnect };
      const stream = await studio.stream(body, { signal: client.signal });
      await stream.take(2).catch(() => undefined);
      client.abort();
      const id = stream.executionId;
      await stateWith(id, ({ disconnected_at }) => disconnected_at !== undefined);
      finish.get(query)?.();
      const ended = await stateWith(id, ({ status }) => status !== 'running');
      expect(ended).toMatchObject({ status: 'completed', response: 'so far so good', subscribers: 0 });
      expect(ended.disconnected_at).toBeDefined();
      const frames = await (await studio.follow(id)).frames();
      expect(faultsOfStream(frames, id)).toEqual([]);
    }
  });

  it('is cancelled where it was asked for, with its text and without its upstream', async () => {
    const query = randomUUID();
    const body = { deployment_name: impatient, query, on_disconnect: 'cancel' };
    const stream = await studio.stream(body);
    const other = await studio.follow(stream.executionId);
    const [head, restOfOther] = [await stream.take(2), await other.take(2)];
    expect(restOfOther).toHaveLength(2);
    expect(textOf(head)).toBe('so far');
    const id = stream.executionId;
    const ended = await stateWith(id, ({ status }) => status !== 'running');
    expect(ended).toMatchObject({ status: 'cancelled', response: 'so far', subscribers: 0 });
    const request = upstream.requests.find(({ body }) => JSON.stringify(body).includes(query));
    expect(await request?.closed).toBe(true);
    const frames = await (await studio.follow(id)).frames();
    expect(faultsOfStream(frames, id)).toEqual([]);
    expect(frames.at(-1)?.chunk.status).toBe('cancelled');
  });

  /** Begins an execution whose client leaves, and waits for its end: one that had lost its clients before would have ended, too. */
  async function untilAnotherIsCancelled(): Promise<void> {
    const request = { deployment_name: impatient, query: randomUUID(), on_disconnect: 'cancel' };
    const stream = await studio.stream(request);
    await stream.take(2);
    await stateWith(stream.executionId, ({ status }) => status === 'cancelled');
  }

  it('is not cancelled while one of several clients is there, or if one comes back in time', async () => {
    const patient = await studio.deploy(upstreamAgent(), { disconnect_grace_ms: 20_000 });
    const query = randomUUID();
    const begun = await studio.stream({ deployment_name: patient, query, on_disconnect: 'cancel' });
    await begun.take(2);
    const id = begun.executionId;
    await stateWith(id, ({ disconnected_at }) => disconnected_at !== undefined);
    const back = await studio.follow(id, 2);
    await stateWith(id, ({ subscribers }) => subscribers === 1);

    const both = randomUUID();
    const first = await studio.stream({ deployment_name: impatient, query: both, on_disconnect: 'cancel' });
    const stays = await studio.follow(first.executionId);
    await stateWith(first.executionId, ({ subscribers }) => subscribers === 2);
    await first.take(2);
    await stateWith(first.executionId, ({ subscribers }) => subscribers === 1);
    await untilAnotherIsCancelled();
    finish.get(both)?.();
    expect(textOf(await stays.frames())).toBe('so far so good');
    finish.get(query)?.();
    expect(textOf(await back.frames())).toBe(' so good');
    expect((await stateOf(id)).status).toBe('completed');
  });

  it('is cancelled, too, when its client left before the first byte, or waited for the whole', async () => {
    const port = Number(new URL(server.url).port);
    for (const path of ['/api/workflows/execute/stream', '/api/workflows/execute']) {
      const query = randomUUID();
      const body = JSON.stringify({ deployment_name: impatient, query, on_disconnect: 'cancel' });
      const socket = connect(port, '127.0.0.1');
      const head = `POST ${path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: ${body.length}\r\n\r\n`;
      await new Promise<void>((resolve) => socket.write(head + body, () => resolve()));
      socket.destroy();
      const id = await executionOf(query);
      const ended = await stateWith(id, ({ status }) => status !== 'queued' && status !== 'running');
      expect(ended).toMatchObject({ status: 'cancelled', subscribers: 0 });
    }
  });

  itInFull(
    'goes on if it never had a client, be it that somebody asked for the head of its stream',
    async () => {
      const query = randomUUID();
      const body = { deployment_name: impatient, query, on_disconnect: 'cancel' };
      const { body: accepted } = await studio.json<{ execution_id: string }>('/api/workflows/execute/async', {
        method: 'POST',
        body,
      });
      await until(() => finish.has(query) || undefined);
      const head = await fetch(`${server.url}/api/executions/${accepted.execution_id}/stream`, {
        method: 'HEAD',
      });
      expect(head.status).toBe(200);
      await untilAnotherIsCancelled();
      finish.get(query)?.();
      const ended = await stateWith(accepted.execution_id, ({ status }) => status !== 'running');
      expect(ended).toMatchObject({ status: 'completed', response: 'so far so good' });
    },
  );
});

it('leaves no count behind, and no process after its shutdown', async () => {
  const counted = () => server.database.query('SELECT 1 FROM execution_subscriber WHERE count > 0');
  await until(async () => (await counted()).length === 0);
  const second = await server.startAnother();
  const stream = await second.studio.stream({
    deployment_name: await studio.deploy(upstreamAgent()),
    query: randomUUID(),
  });
  await stateWith(stream.executionId, ({ subscribers }) => subscribers === 1);
  const here = await studio.follow(stream.executionId);
  await stateWith(stream.executionId, ({ subscribers }) => subscribers === 2);
  const processes = () => server.database.query('SELECT process_id FROM server_process');
  const before = (await processes()).length;
  await second.close();
  expect(await processes()).toHaveLength(before - 1);
  const left = await stateWith(stream.executionId, ({ subscribers }) => subscribers === 1);
  expect(left).not.toHaveProperty('disconnected_at');
  await here.response.body?.cancel();
  await stateWith(stream.executionId, ({ disconnected_at }) => disconnected_at !== undefined);
});

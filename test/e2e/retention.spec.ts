import { describe, expect, it } from '@jest/globals';
import { ExecutionsSweep } from '../../src/executions/executions.sweep.js';
import { Retention } from '../../src/executions/retention.js';
import { expectByChance } from '../support/inconclusive.js';
import { itInFull } from '../support/effort.js';
import { echo, faultsOfStream, until, upstreamAgent } from '../support/studio.js';
import { chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import { withStudio } from '../support/with-studio.js';

interface Execution {
  execution_id: string;
  status: string;
  response: string;
}

const RETENTION_DAYS = 7;
/** A whole stream of this is far more than what fits into the buffers between server and client. */
const LONG_TEXT_CHUNKS = 2000;
const server = withStudio({
  upstream: (response, request) => {
    writeStream(response, chatDelta('x'));
    if (request.body.model !== 'long') return;
    const delta = chatDelta('y'.repeat(10_000));
    for (let chunk = 0; chunk < LONG_TEXT_CHUNKS; chunk++) response.write(delta);
    response.end(chatEnd());
  },
  env: { EVENT_RETENTION_DAYS: String(RETENTION_DAYS) },
});
const { studio } = server;

async function age(executionId: string, days: number): Promise<void> {
  const sql = `UPDATE execution SET finished_at = finished_at - $2 * interval '1 day' WHERE execution_id = $1`;
  await server.database.query(sql, [executionId, days]);
}

const expire = () => server.app.get(Retention).expire(new AbortController().signal);
const chunksOf = (id: string) =>
  server.database.query('SELECT 1 FROM execution_chunk WHERE execution_id = $1', [id]);

describe('the chunks of an execution', () => {
  it('are deleted when they are too old, by the server itself; its result stays', async () => {
    const deployment = await studio.deploy(echo());
    const headers = { 'Idempotency-Key': 'kept' };
    const request = { method: 'POST', body: { deployment_name: deployment, query: 'old' }, headers };
    const [old, young] = [
      (await studio.json<Execution>('/api/workflows/execute', request)).body,
      (await studio.execute<Execution>({ deployment_name: deployment, query: 'young' })).body,
    ];
    const running = await studio.stream({
      deployment_name: await studio.deploy(upstreamAgent()),
      query: 'x',
    });
    const frames = await (await studio.follow(old.execution_id)).frames();
    const steps = await studio.json(`/api/executions/${old.execution_id}/steps`);
    await age(old.execution_id, RETENTION_DAYS);
    await age(young.execution_id, RETENTION_DAYS - 1);
    await server.database.query(
      `UPDATE execution SET created_at = created_at - interval '99 days' WHERE execution_id = $1`,
      [running.executionId],
    );

    await until(async () => (await chunksOf(old.execution_id)).length === 0 || undefined, 30_000);
    const gone = await studio.json<{ detail: string }>(`/api/executions/${old.execution_id}/stream`);
    expect(gone).toMatchObject({ status: 410, body: { code: 'log_expired' } });
    expect(gone.body.detail).toContain(`/api/executions/${old.execution_id}`);
    for (const after of [1, frames.length - 1]) {
      expect((await studio.follow(old.execution_id, after)).status).toBe(410);
    }
    expect((await studio.follow(old.execution_id, frames.length)).status).toBe(204);
    expect((await studio.follow(old.execution_id, frames.length + 1)).status).toBe(400);

    const kept = await studio.json<Execution>(`/api/executions/${old.execution_id}`);
    expect(kept.body).toMatchObject({ status: 'completed', response: old.response });
    expect((await studio.json(`/api/executions/${old.execution_id}/steps`)).body).toEqual(steps.body);
    const again = await studio.json<Execution>('/api/workflows/execute', request);
    expect(again.body).toMatchObject({ execution_id: old.execution_id, response: old.response });
    expect((await studio.stream(request.body, { headers })).status).toBe(410);

    const replay = await (await studio.follow(young.execution_id)).frames();
    expect(faultsOfStream(replay, young.execution_id)).toEqual([]);
    await studio.json(`/api/executions/${running.executionId}/cancel`, { method: 'POST' });
    expect(faultsOfStream(await running.frames(), running.executionId)).toEqual([]);
  });

  it('of very many old executions go in small batches, and changes of status with them', async () => {
    // The server would do the same now and then, and between any two of these lines.
    server.app.get(ExecutionsSweep).onModuleDestroy();
    const deployment = await studio.deploy(echo());
    const template = await studio.execute<Execution>({ deployment_name: deployment, query: 'x' });
    const executions = 1000;
    const chunksEach = 100;
    await server.database.query(
      `INSERT INTO execution (execution_id, deployment_id, deployment_name, environment, workflow_id, revision_id, status, input,
                              created_at, finished_at, last_sequence)
       SELECT gen_random_uuid(), deployment_id, 'many', environment, workflow_id, revision_id, status, input,
              created_at - interval '8 days', finished_at - interval '8 days', $2
         FROM execution, generate_series(1, $3) WHERE execution_id = $1`,
      [template.body.execution_id, chunksEach, executions],
    );
    await server.database.query(
      `INSERT INTO execution_chunk SELECT execution_id, n, n, '{}' FROM execution, generate_series(1, $1) AS n
        WHERE deployment_name = 'many'`,
      [chunksEach],
    );
    const left = () =>
      server.database.query<{ executions: string; chunks: string }>(
        `SELECT count(DISTINCT execution_id) AS executions, count(*) AS chunks
           FROM execution_chunk JOIN execution USING (execution_id) WHERE deployment_name = 'many'`,
      );
    const stop = new AbortController();
    const batch = server.app.get(Retention).expire(stop.signal);
    const [first] = await until(async () => {
      const rows = await left();
      return rows[0]?.chunks === String(executions * chunksEach) ? undefined : rows;
    });
    stop.abort();
    await batch;
    expectByChance('chunks that were left when it was stopped', Number(first?.chunks), 1);
    // No log is cut into: what is left of it is all of it.
    expect(Number(first?.chunks)).toBe(Number(first?.executions) * chunksEach);

    const eventsOf = (name: string) =>
      server.database.query('SELECT 1 FROM status_event WHERE deployment_name = $1', [name]);
    expect((await eventsOf('many')).length).toBe(executions);
    await Promise.all([expire(), expire()]);
    expect(await left()).toEqual([{ executions: '0', chunks: '0' }]);
    expect((await eventsOf('many')).length).toBe(0);
    expect((await eventsOf(deployment)).length).toBeGreaterThan(0);
  });

  itInFull(
    'that are deleted under a reader end its stream, and it is told why when it comes back',
    async () => {
      const deployment = await studio.deploy(upstreamAgent({ model: 'upstream/long' }));
      const { body } = await studio.execute<Execution>({ deployment_name: deployment, query: 'x' });
      const id = body.execution_id;
      const stream = await studio.follow(id);
      const reader = stream[Symbol.asyncIterator]();
      const first = await reader.next();
      expect(first.done).toBe(false);
      await age(id, RETENTION_DAYS);
      await expire();
      expect(await chunksOf(id)).toHaveLength(0);
      let last = 1;
      for (;;) {
        const { done, value } = await reader.next();
        if (done) break;
        expect(value.chunk.sequence).toBe(++last);
      }
      expect(last).toBeLessThan(LONG_TEXT_CHUNKS);
      expect((await studio.follow(id, last)).status).toBe(410);
    },
  );
});

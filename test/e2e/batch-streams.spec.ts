import { randomUUID } from 'node:crypto';
import { beforeAll, describe, expect, it } from '@jest/globals';
import type { BatchAcceptedDto } from '../../src/batches/batches.dto.js';
import { ExecutionsSweep } from '../../src/executions/executions.sweep.js';
import { Retention } from '../../src/executions/retention.js';
import { STREAM_BATCH, byItem, faultsOfMerged, linesOf } from '../support/batches.js';
import { answerOf } from '../support/call-ledger.js';
import { saying } from '../support/deployments.js';
import { itInFull, rounds } from '../support/effort.js';
import { expectByChance } from '../support/inconclusive.js';
import { SlowReader } from '../support/slow-reader.js';
import { faultsOfStream, textOf, until } from '../support/studio.js';
import type { Frame } from '../support/studio.js';
import { itemsOf, queriesOf, withBatches } from '../support/with-batches.js';

const RETENTION_DAYS = 7;
const { ledger, server, api, batches, elsewhere, callsOf } = withBatches({
  EVENT_RETENTION_DAYS: String(RETENTION_DAYS),
});
let deployment: string;

beforeAll(async () => {
  deployment = await deploy(6, 1);
});

const deploy = (pieces: number, pauseMs: number) =>
  batches.studio.deploy({ agents: [ledger.agent('a', pieces, pauseMs)] });
const keyed = (key: string) => ({ 'Idempotency-Key': key });

it('many items at once stay apart: no chunk of one is in the stream of another, and all ids are right', async () => {
  const queries = queriesOf(rounds(100, 40));
  const items = queries.map((query, index) => ({ item_id: `item of ${index}`, query }));
  const stream = await elsewhere.stream({ deployment_name: deployment, items, concurrency: 100 });
  const frames = await stream.frames();
  expect(faultsOfMerged(frames, stream.executionId)).toEqual([]);
  const chunks = byItem(frames);
  expect([...chunks.keys()].toSorted()).toEqual(items.map(({ item_id }) => item_id).toSorted());
  for (const { item_id, query } of items) {
    const own = chunks.get(item_id) ?? [];
    expect(textOf(own)).toBe(answerOf(query, 'a', 6));
    const [{ chunk } = { chunk: undefined }] = own;
    const log = await (await batches.studio.follow(chunk?.execution_id ?? '')).frames();
    expect(faultsOfStream(log, chunk?.execution_id ?? '')).toEqual([]);
    expect(own.map(({ data }) => data)).toEqual(log.map(({ data }) => data));
  }
  expect(callsOf(queries)).toHaveLength(queries.length);
});

it('a stream goes on after every event, at either process and by the repeated POST', async () => {
  const queries = queriesOf(6);
  const body = { deployment_name: deployment, items: itemsOf(queries) };
  const frames = await (await batches.stream(body)).frames();
  const batchId = frames[0]?.chunk.batch_id ?? '';
  expect(faultsOfMerged(frames, batchId)).toEqual([]);
  for (const [index, { id }] of frames.entries()) {
    const at = index % 2 === 0 ? batches : elsewhere;
    const rest = await at.follow(batchId, index + 1);
    const repeated = await elsewhere.stream(body, { headers: { 'Last-Event-ID': id } });
    const isEnd = index === frames.length - 1;
    expect([rest.status, repeated.status]).toEqual(isEnd ? [204, 204] : [200, 200]);
    expect(linesOf(await rest.frames())).toEqual(linesOf(frames.slice(index + 1)));
    expect(linesOf(await repeated.frames())).toEqual(linesOf(frames.slice(index + 1)));
  }
  expect(callsOf(queries)).toHaveLength(6);
});

it('an order of many pieces is gone on with by whoever comes next, though nobody merged it in between', async () => {
  const queries = queriesOf(4);
  const name = await deploy(120, 10);
  // Two of them end long before the others.
  const short = { model: 'upstream/a~3x1' };
  const items = queries.map((query, index) => ({
    query,
    ...(index < 2 ? { runtime_overrides: short } : {}),
  }));
  const { batch_id } = await batches.accept({ deployment_name: name, items });
  const frames: Frame[] = [];
  for (let visits = 0; frames.at(-1)?.chunk.item_id !== undefined || frames.length < 2; visits++) {
    const at = visits % 2 === 0 ? batches : elsewhere;
    frames.push(...(await (await at.follow(batch_id, frames.length)).take(20)));
  }
  expect(faultsOfMerged(frames, batch_id)).toEqual([]);
  for (const [item, chunks] of byItem(frames))
    expect(textOf(chunks)).toBe(answerOf(queries[Number(item)] ?? '', 'a', Number(item) < 2 ? 3 : 120));
  expect(linesOf(await elsewhere.whole(batch_id))).toEqual(linesOf(frames));
  // Some of its rows say how far each item is merged, so that nobody has to read all of them.
  const rows = await server.database.query<{ merged: number[] | null }>(
    'SELECT merged FROM batch_order WHERE batch_id = $1',
    [batch_id],
  );
  expectByChance('rows that say so', rows.filter(({ merged }) => merged !== null).length, 1);
});

it('an event that is not of this batch, or not there yet, is refused and runs nothing', async () => {
  const queries = queriesOf(2);
  const body = { deployment_name: deployment, items: itemsOf(queries) };
  const frames = await (await batches.stream(body)).frames();
  const id = frames[0]?.chunk.batch_id ?? '';
  const item = frames[1]?.chunk.execution_id ?? '';
  const other = await batches.accept({ deployment_name: deployment, items: itemsOf(queriesOf(1)) });
  const get = (eventId: string) =>
    batches.studio.json(`/api/batches/${id}/stream`, { headers: { 'Last-Event-ID': eventId } });
  const post = (changed: object, eventId: string) =>
    batches.ask({ ...body, ...changed }, { 'Last-Event-ID': eventId }, STREAM_BATCH);
  const cursor = { status: 400, body: { code: 'invalid_cursor' } };
  for (const eventId of ['7', id, `${id}:`, `${id}:-1`, `${id}:${frames.length + 1}`, `${id}:1:1`]) {
    expect(await get(eventId)).toMatchObject(cursor);
    expect(await post({}, eventId)).toMatchObject(cursor);
  }
  for (const eventId of [`${item}:1`, `${other.batch_id}:1`])
    expect(await get(eventId)).toMatchObject(cursor);
  for (const changed of [{ items: itemsOf(queriesOf(2)) }, { concurrency: 1 }, { on_item_error: 'stop' }])
    expect(await post(changed, `${id}:1`)).toMatchObject(cursor);
  expect(await post({}, `${other.batch_id}:1`)).toMatchObject(cursor);
  // The same, said otherwise.
  const said = { ...body, include: [] };
  expect((await batches.stream(said, { headers: { 'Last-Event-ID': `${id}:1` } })).status).toBe(200);
  for (const after of ['-1', 'x', '1.5']) {
    expect((await batches.studio.json(`/api/batches/${id}/stream?after=${after}`)).status).toBe(400);
  }
  expect(callsOf(queries)).toHaveLength(2);
});

describe('an Idempotency-Key', () => {
  it('runs each item once, though a hundred equal batches arrive at the same moment at two processes', async () => {
    const queries = queriesOf(5);
    queries.forEach((query) => ledger.hold(query));
    const body = { deployment_name: deployment, items: itemsOf(queries) };
    const headers = keyed(randomUUID());
    const asked = Array.from({ length: 100 }, async (_, index) => {
      const at = index % 2 === 0 ? batches : elsewhere;
      if (index % 4 < 2) return (await at.accept(body, headers)).batch_id;
      const stream = await at.stream(body, { headers });
      const frames = await stream.frames();
      expect(faultsOfMerged(frames, stream.executionId)).toEqual([]);
      return stream.executionId;
    });
    await until(() => callsOf(queries).length === 5);
    queries.forEach((query) => ledger.letGo(query));
    expect(new Set(await Promise.all(asked)).size).toBe(1);
    expect(callsOf(queries)).toHaveLength(5);
    const rows = await server.database.query('SELECT 1 FROM execution WHERE idempotency_key = $1', [
      headers['Idempotency-Key'],
    ]);
    expect(rows).toHaveLength(1);
  });

  it('belongs to one batch or one execution: another body, or the other kind of request, gets 422', async () => {
    const [key, single] = [keyed(randomUUID()), keyed(randomUUID())];
    const queries = queriesOf(2);
    const body = { deployment_name: deployment, items: itemsOf(queries) };
    const first = await batches.accept(body, key);
    const reused = { status: 422, body: { code: 'idempotency_key_reused' } };
    const others = [
      { ...body, items: itemsOf(queries.slice(0, 1)) },
      { ...body, items: itemsOf(queries.toReversed()) },
      { ...body, concurrency: 2 },
      { ...body, on_item_error: 'stop' },
      { ...body, include: ['progress'] },
      { ...body, environment: 'production' },
      { ...body, items: queries.map((query, index) => ({ query, item_id: `x${index}` })) },
    ];
    for (const other of others) {
      expect(await elsewhere.ask(other, key)).toMatchObject(reused);
      expect(await batches.ask(other, key, STREAM_BATCH)).toMatchObject(reused);
    }
    const execution = { deployment_name: deployment, query: queries[0] };
    for (const route of ['', '/async', '/stream']) {
      const path = `/api/workflows/execute${route}`;
      expect(await batches.ask(execution, key, path)).toMatchObject(reused);
    }
    await batches.ask(execution, single, '/api/workflows/execute/async');
    expect(await batches.ask({ ...body, items: [{ query: queries[0] }] }, single)).toMatchObject(reused);
    // The same batch, said otherwise.
    const said = queries.map((query) => ({ query, chat_history: [] }));
    const again = await elsewhere.accept({ ...body, items: said, include: [] }, key);
    expect(again).toEqual(first);
    expect(callsOf(queries.slice(1))).toHaveLength(1);
  });

  it('gets the same batch after its end, also when the deployment was stopped since', async () => {
    const name = await batches.studio.deploy(saying('x'));
    const body = { deployment_name: name, items: itemsOf(queriesOf(3)) };
    const headers = keyed(randomUUID());
    const frames = await (await batches.stream(body, { headers })).frames();
    await batches.studio.json(`/api/workflows/deployments/${name}/stop`, { method: 'POST' });
    expect(linesOf(await (await elsewhere.stream(body, { headers })).frames())).toEqual(linesOf(frames));
    expect((await batches.ask<BatchAcceptedDto>(body, headers)).body.batch_id).toBe(
      frames[0]?.chunk.batch_id,
    );
    expect((await batches.ask(body, keyed(randomUUID()))).status).toBe(404);
  });
});

describe('the merged log', () => {
  const age = (table: 'batch' | 'execution', batchId: string, days: number) =>
    server.database.query(
      `UPDATE ${table} SET finished_at = finished_at - $2 * interval '1 day' WHERE batch_id = $1`,
      [batchId, days],
    );
  const expire = () => server.app.get(Retention).expire(new AbortController().signal);
  const logsOf = async (batchId: string) => {
    const sql = `SELECT DISTINCT execution_id FROM execution_chunk LEFT JOIN execution USING (execution_id)
                  WHERE execution_id = $1 OR batch_id = $1`;
    return (await server.database.query(sql, [batchId])).length;
  };

  beforeAll(() => {
    // The server would do the same now and then, and between any two of these lines.
    server.app.get(ExecutionsSweep).onModuleDestroy();
  });

  it('keeps the logs of its items for as long as itself, and is gone as a whole; the results stay', async () => {
    const frames = await (
      await batches.stream({ deployment_name: deployment, items: itemsOf(queriesOf(4)) })
    ).frames();
    const batchId = frames[0]?.chunk.batch_id ?? '';
    const results = await batches.results(batchId);
    // Items that ended long before the batch did.
    await age('execution', batchId, RETENTION_DAYS + 1);
    await expire();
    expect(await logsOf(batchId)).toBe(5);
    expect(linesOf(await elsewhere.whole(batchId))).toEqual(linesOf(frames));

    await age('batch', batchId, RETENTION_DAYS);
    await expire();
    await expire();
    expect(await logsOf(batchId)).toBe(0);
    // All that is left tells how long it was.
    const kept = 'SELECT last_position FROM batch_order WHERE batch_id = $1';
    expect(await server.database.query(kept, [batchId])).toEqual([{ last_position: frames.length }]);
    const gone = await batches.studio.json<{ detail: string }>(`/api/batches/${batchId}/stream`);
    expect(gone).toMatchObject({ status: 410, body: { code: 'log_expired' } });
    expect(gone.body.detail).toContain(`/api/batches/${batchId}/results`);
    expect((await elsewhere.follow(batchId, 3)).status).toBe(410);
    expect((await elsewhere.follow(batchId, frames.length)).status).toBe(204);
    expect((await elsewhere.follow(batchId, frames.length + 1)).status).toBe(400);
    const responses = (await batches.results(batchId)).map(({ response }) => response);
    expect(responses).toEqual(results.map(({ response }) => response));
    expect(await batches.get(batchId)).toMatchObject({ status: 'completed', counts: { completed: 4 } });
  });

  const readers: [string, boolean][] = [
    ['that is just being merged', false],
    ['whose order was complete before it was read', true],
  ];
  itInFull.each(readers)(
    '%s, deleted under a reader: its stream ends, and it is told why when it comes back',
    async (_name, isMerged) => {
      const template = `{% for i in (1..200) %}${'x'.repeat(500)}{% endfor %}`;
      const long = await batches.studio.deploy(saying(template));
      const { batch_id } = await batches.accept({ deployment_name: long, items: itemsOf(queriesOf(100)) });
      await until(async () => (await batches.get(batch_id, '')).status === 'completed' || undefined);
      if (isMerged) await batches.whole(batch_id);
      const reader = await SlowReader.open(`${api.url}/api/batches/${batch_id}/stream`);
      await until(() => reader.received > 1000 || undefined);
      await age('execution', batch_id, RETENTION_DAYS + 1);
      await age('batch', batch_id, RETENTION_DAYS + 1);
      await expire();
      await expire();
      expect(await logsOf(batch_id)).toBe(0);
      reader.hurry();
      const frames = await reader.stream.frames();
      frames.forEach(({ id }, index) => expect(id).toBe(`${batch_id}:${index + 1}`));
      expect(frames.length).toBeGreaterThan(0);
      expect(frames.at(-1)?.chunk.item_id).toBeDefined();
      expect((await batches.follow(batch_id, frames.length)).status).toBe(410);
    },
  );
});

import { randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { beforeAll, describe, expect, it, jest } from '@jest/globals';
import type { BatchAcceptedDto } from '../../src/batches/batches.dto.js';
import { ExecutionEnds } from '../../src/executions/ends.js';
import { BatchRoutes, byItem, faultsOfMerged, linesOf } from '../support/batches.js';
import { saying } from '../support/deployments.js';
import { rounds } from '../support/effort.js';
import { expectByChance } from '../support/inconclusive.js';
import { isTerminal, textOf, until } from '../support/studio.js';
import type { Frame } from '../support/studio.js';
import { itemsOf, queriesOf, withBatches } from '../support/with-batches.js';
import { withStudio } from '../support/with-studio.js';
import { Yardstick } from '../support/yardstick.js';

/** How soon the model has lost its connections. */
const CUT_OFF_MS = 1000;
const { ledger, server, batches, elsewhere, callsOf } = withBatches();
/** A process that no worker takes anything from, unless a test starts one. */
const idle = withStudio({ env: { ROLE: 'api' } });
const idly = new BatchRoutes(idle.studio);
let deployment: string;

beforeAll(async () => {
  deployment = await batches.studio.deploy({ agents: [ledger.agent('a', 6, 1)] });
});

it('a batch whose items take long to end holds up no other one', async () => {
  const ends = server.app.get(ExecutionEnds);
  const queries = queriesOf(3);
  queries.forEach((query) => ledger.hold(query));
  const body = { deployment_name: deployment, items: itemsOf(queries), concurrency: 1 };
  const { batch_id } = (await batches.ask<BatchAcceptedDto>(body)).body;
  await until(() => callsOf(queries).length === 1 || undefined);
  let letGo: () => void = () => undefined;
  const held = new Promise<void>((resolve) => (letGo = resolve));
  const end = ends.end.bind(ends);
  const spy = jest.spyOn(ends, 'end').mockImplementation(async (...args) => held.then(() => end(...args)));
  try {
    const cancelled = batches.cancel(batch_id);
    await until(() => spy.mock.calls.length >= 2 || undefined);
    const other = await batches.stream({
      deployment_name: deployment,
      items: itemsOf(queriesOf(3)),
      concurrency: 1,
    });
    expect((await other.frames()).at(-1)?.chunk).toMatchObject({ status: 'completed' });
    letGo();
    expect(await cancelled).toMatchObject(CANCELLED);
    // Each was ended once, and not again by each look at the batch meanwhile.
    expect(spy.mock.calls).toHaveLength(2);
  } finally {
    letGo();
    spy.mockRestore();
  }
});

const CANCELLED = { status: 202, body: { status: 'cancelled' } };

describe('cancelling a batch', () => {
  it.each([
    ['at the process that runs it', () => batches],
    ['at another process', () => elsewhere],
  ])(
    'ends all of it for all readers, %s: the model is cut off, the text so far is kept',
    async (_name, at) => {
      const queries = queriesOf(20);
      queries.forEach((query) => ledger.hold(query));
      const deployment = await batches.studio.deploy({ agents: [ledger.agent('a', 4, 0)] });
      const body = { deployment_name: deployment, items: itemsOf(queries), concurrency: 8 };
      const stream = await batches.stream(body);
      const batchId = stream.executionId;
      const other = elsewhere.whole(batchId);
      await until(async () => {
        const said = await server.database.query(
          `SELECT 1 FROM execution JOIN execution_chunk USING (execution_id) WHERE batch_id = $1 AND execution_chunk.last_sequence = 3`,
          [batchId],
        );
        return (callsOf(queries).length === 8 && said.length === 8) || undefined;
      });
      const yardstick = await Yardstick.lay();
      expect(await at().cancel(batchId)).toMatchObject(CANCELLED);
      const acknowledged = Date.now();
      const frames = await stream.frames();
      expect(faultsOfMerged(frames, batchId)).toEqual([]);
      expect(frames.at(-1)?.chunk).toMatchObject({
        status: 'cancelled',
        data: { counts: { total: 20, cancelled: 20, completed: 0, error: 0, running: 0, queued: 0 } },
      });
      expect(linesOf(await other)).toEqual(linesOf(frames));
      expect(await Promise.all(callsOf(queries).map(({ closed }) => closed))).toEqual(Array(8).fill(true));
      const lastEnd = Math.max(...callsOf(queries).map(({ endedAt = Infinity }) => endedAt));
      await yardstick.expectAtMost(lastEnd - acknowledged, CUT_OFF_MS, 'cutting off the models');
      const results = await batches.results(batchId);
      expect(results.map(({ status }) => status)).toEqual(Array(20).fill('cancelled'));
      results.forEach(({ item_id, response = '' }, index) => {
        expect(response).toBe(textOf(byItem(frames).get(item_id) ?? []));
        expect(response === '').toBe(index >= 8);
      });
      expect(callsOf(queries)).toHaveLength(8);
      queries.forEach((query) => ledger.letGo(query));
    },
  );

  it('again, and many at once at two processes, changes nothing', async () => {
    const queries = queriesOf(10);
    queries.forEach((query) => ledger.hold(query));
    const deployment = await batches.studio.deploy({ agents: [ledger.agent('a', 2, 0)] });
    const { batch_id } = await batches.accept({ deployment_name: deployment, items: itemsOf(queries) });
    await ledger.call(queries[0] ?? '');
    const routes = Array.from({ length: 20 }, (_, index) => (index % 2 === 0 ? batches : elsewhere));
    const answers = await Promise.all(routes.map((at) => at.cancel(batch_id)));
    answers.push(await batches.cancel(batch_id));
    expect(new Set(answers.map(({ status }) => status))).toEqual(new Set([202]));
    const frames = await elsewhere.whole(batch_id);
    expect(faultsOfMerged(frames, batch_id)).toEqual([]);
    expect(frames.filter((frame) => isTerminal(frame) && frame.chunk.item_id === undefined)).toHaveLength(1);
    queries.forEach((query) => ledger.letGo(query));
  });

  it('that is completed is refused', async () => {
    const deployment = await batches.studio.deploy(saying('x'));
    const stream = await batches.stream({ deployment_name: deployment, items: [{ query: 'x' }] });
    await stream.frames();
    expect(await elsewhere.cancel(stream.executionId)).toMatchObject({
      status: 409,
      body: { code: 'batch_finished' },
    });
  });

  it('before the start ends it without a step, and leaves nothing in the queue', async () => {
    const deployment = await idly.studio.deploy(saying('ran'));
    const items = itemsOf(queriesOf(12));
    const stream = await idly.stream({ deployment_name: deployment, items, concurrency: 5 });
    expect(await idly.cancel(stream.executionId)).toMatchObject(CANCELLED);
    const frames = await stream.frames();
    expect(faultsOfMerged(frames, stream.executionId)).toEqual([]);
    expect(frames).toHaveLength(2 + 2 * items.length);
    const worker = await idle.startAnother({ ROLE: 'all' });
    // The worker has been through the queue.
    expect(textOf(await (await idly.stream({ deployment_name: deployment, items })).frames())).toContain(
      'ran',
    );
    const sql = 'SELECT 1 FROM step JOIN execution USING (execution_id) WHERE batch_id = $1';
    expect(await idle.database.query(sql, [stream.executionId])).toEqual([]);
    expect(linesOf(await idly.whole(stream.executionId))).toEqual(linesOf(frames));
    await worker.close();
  });

  it('lets no step begin after its answer', async () => {
    const agents = Array.from({ length: 15 }, (_, index) => ledger.agent(`a${index}`, 1, 5));
    const connections = agents.slice(1).map(({ agent_id }, index) => ({
      source_agent_id: `a${index}`,
      target_agent_id: agent_id,
    }));
    const deployment = await batches.studio.deploy({ agents, connections });
    for (let round = 0; round < rounds(6, 2); round++) {
      const queries = queriesOf(10);
      const items = itemsOf(queries);
      const { batch_id } = await batches.accept({ deployment_name: deployment, items, concurrency: 4 });
      await until(() => callsOf(queries).length >= 4 + 2 * round || undefined);
      expect(await (round % 2 === 0 ? batches : elsewhere).cancel(batch_id)).toMatchObject(CANCELLED);
      const begun = callsOf(queries).length;
      const frames = await batches.whole(batch_id);
      expect(faultsOfMerged(frames, batch_id)).toEqual([]);
      await Promise.all(callsOf(queries).map(({ closed }) => closed));
      expect(callsOf(queries)).toHaveLength(begun);
    }
  });

  it('that races its end is either kept or refused, and there is one end', async () => {
    const deployment = await batches.studio.deploy(saying('done'));
    const NEEDED = rounds(3, 1);
    const outcomes = { 202: 0, 409: 0 };
    // Cancels earlier after each batch that was faster and later after each that was not, so that both keep happening.
    let delay = 15;
    const enough = () => outcomes[202] >= NEEDED && outcomes[409] >= NEEDED;
    for (let round = 0; round < rounds(12, 4) || (round < 150 && !enough()); round++) {
      const items = itemsOf(queriesOf(3));
      const stream = await batches.stream({ deployment_name: deployment, items });
      const reading: Promise<Frame[]> = stream.frames();
      const batchId = stream.executionId;
      if (delay > 0) await sleep(delay);
      const { status } = await (round % 2 === 0 ? batches : elsewhere).cancel(batchId);
      if (status !== 202 && status !== 409) throw new Error(`The cancellation was answered with ${status}.`);
      outcomes[status]++;
      delay = status === 202 ? delay * 1.2 + 1 : Math.max(0, delay / 1.2 - 1);
      const frames = await reading;
      const end = status === 202 ? 'cancelled' : 'completed';
      expect([faultsOfMerged(frames, batchId), frames.at(-1)?.chunk.status]).toEqual([[], end]);
      expect((await elsewhere.get(batchId)).status).toBe(end);
      expect(linesOf(await elsewhere.whole(batchId))).toEqual(linesOf(frames));
    }
    expectByChance('cancellations that were kept', outcomes[202], NEEDED);
    expectByChance('cancellations that came too late', outcomes[409], NEEDED);
  });
});

describe('connections that wait for notifications', () => {
  it('may be cut in the middle of a batch: its streams go on at both processes', async () => {
    const queries = queriesOf(8);
    queries.forEach((query) => ledger.hold(query));
    const stream = await batches.stream({ deployment_name: deployment, items: itemsOf(queries) });
    const batchId = stream.executionId;
    const reading = [stream.frames(), elsewhere.whole(batchId)];
    for (const query of queries) {
      await ledger.call(query);
      await server.database.query(
        `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
          WHERE datname = current_database() AND pid <> pg_backend_pid()
            AND (query ILIKE 'listen%' OR query ILIKE '%pg_notify%')`,
      );
      ledger.letGo(query);
    }
    const [here = [], there = []] = await Promise.all(reading);
    expect(faultsOfMerged(here, batchId)).toEqual([]);
    expect(linesOf(there)).toEqual(linesOf(here));
    expect(queries.map((query) => ledger.of(query).length)).toEqual(queries.map(() => 1));
  });
});

describe('a process that has heard of nothing but the end of a batch', () => {
  it('sends the ends of its items all the same, and before it', async () => {
    const items = itemsOf(['x', 'y', 'z']);
    const name = await idly.studio.deploy(saying('x'));
    const stream = await idly.stream({ deployment_name: name, items });
    const frames: Frame[] = [];
    for await (const frame of stream) {
      frames.push(frame);
      // What another process would write, all at once, and what is heard of it.
      if (frames.length === 1 + items.length) await endAll(frames);
    }
    expect(frames.map(({ chunk }) => [chunk.item_id, chunk.sequence])).toEqual([
      [undefined, 1],
      ...items.map(() => [expect.any(String), 1]),
      ...items.map(() => [expect.any(String), 2]),
      [undefined, 2],
    ]);
  });

  /** Ends a batch and its items, whose first chunks these are, and tells only of the batch. */
  async function endAll(firsts: Frame[]): Promise<void> {
    const [batchId = ''] = firsts.map(({ chunk }) => chunk.batch_id);
    const ids = firsts.map(({ chunk }) => chunk.execution_id ?? batchId);
    const lasts = firsts.map(({ data }) =>
      data.replace('"status":"started"', '"status":"completed"').replace('"sequence":1', '"sequence":2'),
    );
    await idle.database.query(
      `WITH items AS (UPDATE execution SET status = 'completed', finished_at = now(), last_sequence = 2 WHERE batch_id = $1),
            ended AS (UPDATE batch SET status = 'completed', finished_at = now() WHERE batch_id = $1)
       INSERT INTO execution_chunk SELECT id, 2, 2, chunk FROM unnest($2::uuid[], $3::text[]) AS last (id, chunk)`,
      [batchId, ids, lasts],
    );
    await idle.database.query("SELECT pg_notify('agent_studio_log', $1)", [`${randomUUID()} ${batchId}:2`]);
  }
});

describe('the server is away for a moment', () => {
  it('after all items have ended and before the batch has: the next one ends it, and its streams with it', async () => {
    const queries = queriesOf(3);
    const body = { deployment_name: deployment, items: itemsOf(queries) };
    const frames = await (await batches.stream(body)).frames();
    const batchId = frames[0]?.chunk.batch_id ?? '';
    // As if the process had died between the end of the last item and that of the batch.
    await server.database.query(
      `WITH gone AS (DELETE FROM execution_chunk WHERE execution_id = $1 AND first_sequence = 2),
            open AS (DELETE FROM batch_order WHERE batch_id = $1 AND parts = '0:2-2')
       UPDATE batch SET status = 'running', finished_at = NULL WHERE batch_id = $1`,
      [batchId],
    );
    const again = await elsewhere.whole(batchId);
    expect(faultsOfMerged(again, batchId)).toEqual([]);
    expect(linesOf(again).slice(0, -1)).toEqual(linesOf(frames).slice(0, -1));
    await until(async () => (await batches.get(batchId)).status === 'completed' || undefined);
  });
});

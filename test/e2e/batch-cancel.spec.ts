import { randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { startTestApp } from '../support/app.js';
import type { TestApp } from '../support/app.js';
import { BatchRoutes, byItem, faultsOfMerged, linesOf } from '../support/batches.js';
import { CallLedger, markerOf } from '../support/call-ledger.js';
import { saying } from '../support/deployments.js';
import { rounds } from '../support/effort.js';
import { expectByChance } from '../support/inconclusive.js';
import { Studio, isTerminal, textOf, until } from '../support/studio.js';
import type { Frame } from '../support/studio.js';
import { Yardstick } from '../support/yardstick.js';

/** How soon the model has lost its connections. */
const CUT_OFF_MS = 1000;
let ledger: CallLedger;
let server: TestApp;
let api: TestApp;
let batches: BatchRoutes;
/** The same database, by a process that runs nothing itself. */
let elsewhere: BatchRoutes;

beforeAll(async () => {
  ledger = await CallLedger.start();
  const env = { MODEL_PROVIDERS: ledger.providers };
  server = await startTestApp(env);
  api = await startTestApp({ ...env, ROLE: 'api' }, server.database);
  batches = new BatchRoutes(new Studio(server.url));
  elsewhere = new BatchRoutes(new Studio(api.url));
});
afterAll(async () => {
  await api.close();
  await server.close();
  await ledger.stop();
});

const queriesOf = (count: number) => {
  const name = randomUUID();
  return Array.from({ length: count }, (_, index) => markerOf(`${name}-${index}`));
};
const itemsOf = (queries: string[]) => queries.map((query) => ({ query }));
const callsOf = (queries: string[]) => ledger.calls.filter(({ marker }) => queries.includes(marker));
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
    const idle = await startTestApp({ ROLE: 'api' });
    try {
      const at = new BatchRoutes(new Studio(idle.url));
      const deployment = await at.studio.deploy(saying('ran'));
      const items = itemsOf(queriesOf(12));
      const stream = await at.stream({ deployment_name: deployment, items, concurrency: 5 });
      expect(await at.cancel(stream.executionId)).toMatchObject(CANCELLED);
      const frames = await stream.frames();
      expect(faultsOfMerged(frames, stream.executionId)).toEqual([]);
      expect(frames).toHaveLength(2 + 2 * items.length);
      const worker = await startTestApp({}, idle.database);
      // The worker has been through the queue.
      expect(textOf(await (await at.stream({ deployment_name: deployment, items })).frames())).toContain(
        'ran',
      );
      const sql = 'SELECT 1 FROM step JOIN execution USING (execution_id) WHERE batch_id = $1';
      expect(await idle.database.query(sql, [stream.executionId])).toEqual([]);
      expect(linesOf(await at.whole(stream.executionId))).toEqual(linesOf(frames));
      await worker.close();
    } finally {
      await idle.close();
    }
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
    const NEEDED = rounds(5, 1);
    const outcomes = { 202: 0, 409: 0 };
    // Cancels earlier after each batch that was faster and later after each that was not, so that both keep happening.
    let delay = 15;
    const enough = () => outcomes[202] >= NEEDED && outcomes[409] >= NEEDED;
    for (let round = 0; round < rounds(25, 4) || (round < 150 && !enough()); round++) {
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

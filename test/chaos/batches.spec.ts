import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { BatchClient } from '../support/batch-client.js';
import { BatchRoutes, byItem, faultsOfMerged, linesOf } from '../support/batches.js';
import { answerOf } from '../support/call-ledger.js';
import { Chaos, PATIENCE_MS, START_MS } from '../support/chaos.js';
import type { StackProcess } from '../support/chaos.js';
import { expectByChance } from '../support/inconclusive.js';
import { Random, SEED } from '../support/random.js';
import { kept, textOf, until } from '../support/studio.js';
import type { Frame } from '../support/studio.js';
import { Yardstick } from '../support/yardstick.js';

const PIECES = 10;
/** A whole test; only ends one that hangs. */
const HANG_MS = 100_000;

let chaos: Chaos;
let deployment: string;
let clients = 0;

beforeAll(async () => {
  // So many losses in a row are chance here, not a fault of the execution.
  chaos = await Chaos.start({ env: { MAX_LOST_ATTEMPTS: '50' } });
  deployment = await chaos.studio().deploy({ agents: [chaos.ledger.agent('a', PIECES, 30)] });
}, START_MS);
afterAll(() => chaos?.stop(), START_MS);

const routes = (index: number) => new BatchRoutes(chaos.studio(index));
const range = (count: number) => Array.from({ length: count }, (_, index) => index);

interface Batch {
  body: { deployment_name: string; items: { item_id: string; query: string }[]; concurrency: number };
  key: string;
  queries: string[];
  /** Indexes of items that fail: their models fall silent, and they run into their time limit. */
  failing: number[];
}

function newBatch(
  items: number,
  { concurrency, failing = [] }: { concurrency: number; failing?: number[] },
): Batch {
  const queries = range(items).map(() => chaos.marker('item'));
  const asked = queries.map((query, index) => {
    const item = { item_id: `item ${index}`, query };
    if (!failing.includes(index)) return item;
    chaos.ledger.hold(query);
    return { ...item, runtime_overrides: { timeout: 1 } };
  });
  const body = { deployment_name: deployment, items: asked, concurrency };
  return { body, key: chaos.marker('batch'), queries, failing };
}

function clientOf({ body, key }: Batch, cuts: number[] = []): BatchClient {
  const random = new Random(SEED + ++clients);
  return new BatchClient(body, key, { urls: chaos.apiUrls, random, patienceMs: PATIENCE_MS }, cuts);
}

/** How many items of a batch have ended, at whatever process that answers. */
const endedOf = async (key: string) => {
  const [row] = await chaos.sql<{ ended: number }>(
    `SELECT count(*)::int AS ended FROM execution
      WHERE batch_id = (SELECT batch_id FROM execution WHERE idempotency_key = $1) AND status NOT IN ('queued', 'running')`,
    [key],
  );
  return row?.ended ?? 0;
};

/** Fails with what is wrong with a batch that was to run to its end, and with what its clients got of it. */
async function expectWhole({ queries, failing }: Batch, all: BatchClient[]): Promise<void> {
  const [batchId = '', ...others] = new Set(all.map((client) => client.batchId));
  expect(others).toEqual([]);
  const log = await routes(0).whole(batchId);
  expect(faultsOfMerged(log, batchId)).toEqual([]);
  for (const client of all) {
    expect(client.faults).toEqual([]);
    expect(linesOf(client.frames)).toEqual(linesOf(log));
  }
  expect(linesOf(await routes(1).whole(batchId))).toEqual(linesOf(log));
  await expectItems(log, { queries, failing });
  const results = await routes(1).results(batchId);
  expect(results.map(({ index, item_id }) => [index, item_id])).toEqual(
    queries.map((_, index) => [index, `item ${index}`]),
  );
  results.forEach(({ status, error, response }, index) => {
    if (failing.includes(index)) expect([status, error?.code]).toEqual(['error', 'timeout']);
    else expect([status, response]).toEqual(['completed', answerOf(queries[index] ?? '', 'a', PIECES)]);
  });
  expect(log.at(-1)?.chunk.data).toMatchObject({
    counts: { total: queries.length, completed: queries.length - failing.length, error: failing.length },
  });
}

/** Each item said its whole answer, and its model was called once for each time that it was begun. */
async function expectItems(
  log: Frame[],
  { queries, failing }: Pick<Batch, 'queries' | 'failing'>,
): Promise<void> {
  const items = byItem(log);
  const ids = range(queries.length).map((index) => items.get(`item ${index}`)?.[0]?.chunk.execution_id ?? '');
  const rows = new Map((await chaos.rows(ids)).map((row) => [row.execution_id, row]));
  queries.forEach((query, index) => {
    const said = textOf(kept(items.get(`item ${index}`) ?? []), 'a');
    const whole = answerOf(query, 'a', PIECES);
    if (failing.includes(index)) expect(whole.startsWith(said)).toBe(true);
    else expect(said).toBe(whole);
    const calls = chaos.ledger.of(query).length;
    // One whose worker died before the call can meet its time limit instead.
    expect(calls).toBeGreaterThanOrEqual(failing.includes(index) ? 0 : 1);
    expect(calls).toBeLessThanOrEqual(rows.get(ids[index] ?? '')?.attempt ?? 0);
  });
}

/** A worker in the middle of a call of some batch. */
async function workerOf({ queries }: Batch): Promise<StackProcess> {
  return until(async () => {
    const open = chaos.ledger.calls.filter(
      ({ marker, endedAt }) => endedAt === undefined && queries.includes(marker),
    );
    return open.length === 0 ? undefined : chaos.callerOf(chaos.random.pick(open)).catch(() => undefined); // it may have ended meanwhile
  });
}

describe('a batch of 100 items, ten of which fail', () => {
  it(
    'survives the SIGKILL of a worker, and of an api process, under readers that come back at others',
    async () => {
      await chaos.reporting(async () => {
        const failing = range(10).map((index) => 10 * index + 3);
        const batch = newBatch(100, { concurrency: 30, failing });
        const cuts = () => range(3).map(() => chaos.random.int(1, 250));
        const all = range(4).map(() => clientOf(batch, cuts()));
        const reading = Promise.all(all.map((client) => client.follow()));
        reading.catch(() => undefined); // awaited below, unless something else fails first
        await until(async () => (await endedOf(batch.key)) >= 20 || undefined);
        const worker = chaos.kill(await workerOf(batch));
        await until(async () => (await endedOf(batch.key)) >= 50 || undefined);
        const api = chaos.kill(chaos.random.pick(chaos.stack.apis));
        await Promise.all([worker, api]);
        await reading;
        await expectWhole(batch, all);
        expectByChance('connections of a client', Math.min(...all.map(({ connections }) => connections)), 4);
        const [{ again } = { again: 0 }] = await chaos.sql<{ again: number }>(
          'SELECT count(*)::int AS again FROM execution WHERE batch_id = $1 AND attempt > 1',
          [all[0]?.batchId],
        );
        expectByChance('items that were taken over', again, 1);
      }, HANG_MS);
    },
    HANG_MS + 10_000,
  );
});

describe('a batch that is under way', () => {
  it(
    'survives that every process is restarted in turn, and its readers have it whole',
    async () => {
      await chaos.reporting(async () => {
        const batch = newBatch(60, { concurrency: 10 });
        // Some last until everything has been restarted.
        const held = batch.queries.slice(0, 3);
        held.forEach((query) => chaos.ledger.hold(query));
        const all = range(3).map(() => clientOf(batch));
        const reading = Promise.all(all.map((client) => client.follow()));
        reading.catch(() => undefined); // awaited below, unless something else fails first
        const { apis, workers } = chaos.stack;
        await until(async () => (await endedOf(batch.key)) >= 5 || undefined);
        for (const server of [workers[0], apis[0], workers[1], apis[1]]) await server?.restart('SIGTERM');
        held.forEach((query) => chaos.ledger.letGo(query));
        await reading;
        await expectWhole(batch, all);
        expectByChance('connections of a client', Math.min(...all.map(({ connections }) => connections)), 2);
      }, HANG_MS);
    },
    HANG_MS + 10_000,
  );

  it(
    'when everything is killed, its database included, runs to its end, and has one order for all',
    async () => {
      await chaos.reporting(async () => {
        const { postgres, redis, apis, workers } = chaos.stack;
        const batch = newBatch(40, { concurrency: 10 });
        const { batch_id } = await routes(0).accept(batch.body, { 'Idempotency-Key': batch.key });
        const left = routes(1)
          .whole(batch_id)
          .catch(() => undefined); // its server is killed
        await until(async () => (await endedOf(batch.key)) >= 10 || undefined);
        await Promise.all([postgres, redis, ...apis, ...workers].map(async (part) => part?.stop('SIGKILL')));
        await left;
        await Promise.all([postgres?.start(), redis?.start()]);
        await Promise.all([...apis, ...workers].map((server) => server.start()));
        const all = range(2).map(() => clientOf(batch));
        await Promise.all(all.map((client) => client.follow()));
        const [log = []] = all.map(({ frames }) => frames);
        expect(faultsOfMerged(log, batch_id)).toEqual([]);
        expect(linesOf(all[1]?.frames ?? [])).toEqual(linesOf(log));
        expect(linesOf(await routes(1).whole(batch_id))).toEqual(linesOf(log));
        const batchNow = await routes(0).get(batch_id);
        expect(batchNow.counts).toMatchObject({ total: 40, completed: 40 });
        batchNow.items.forEach(({ response }, index) =>
          expect(response).toBe(answerOf(batch.queries[index] ?? '', 'a', PIECES)),
        );
      }, HANG_MS);
    },
    HANG_MS + 10_000,
  );
});

describe('a batch at two api processes', () => {
  it(
    'has one order, though both of them merge it at the same time, with many readers each',
    async () => {
      await chaos.reporting(async () => {
        const batch = newBatch(30, { concurrency: 30 });
        const { batch_id } = await routes(0).accept(batch.body, { 'Idempotency-Key': batch.key });
        const readers = range(20).map((index) => routes(index % 2).whole(batch_id));
        const [first = [], ...others] = await Promise.all(readers);
        expect(faultsOfMerged(first, batch_id)).toEqual([]);
        for (const other of others) expect(linesOf(other)).toEqual(linesOf(first));
        const rows = await chaos.sql('SELECT 1 FROM batch_order WHERE batch_id = $1', [batch_id]);
        expectByChance('pieces of the order', rows.length, 10);
      }, HANG_MS);
    },
    HANG_MS + 10_000,
  );

  it(
    'is cancelled at either of them, whichever worker runs its items, and nothing begins after that',
    async () => {
      await chaos.reporting(async () => {
        for (const index of [0, 1]) {
          const batch = newBatch(30, { concurrency: 8 });
          batch.queries.forEach((query) => chaos.ledger.hold(query));
          const reading = [routes(0), routes(1)].map((at) =>
            at.stream(batch.body, { headers: { 'Idempotency-Key': batch.key } }),
          );
          const calls = () => batch.queries.flatMap((query) => chaos.ledger.of(query));
          await until(() => calls().length === 8 || undefined);
          const streams = await Promise.all(reading);
          const batchId = streams[0]?.executionId ?? '';
          const yardstick = await Yardstick.lay(chaos.stack.databaseUrl);
          const answer = await routes(index).cancel(batchId);
          expect([answer.status, answer.body.status]).toEqual([202, 'cancelled']);
          const acknowledged = Date.now();
          const [here = [], there = []] = await Promise.all(streams.map((stream) => stream.frames()));
          expect(faultsOfMerged(here, batchId)).toEqual([]);
          expect(linesOf(there)).toEqual(linesOf(here));
          expect(here.at(-1)?.chunk.status).toBe('cancelled');
          await Promise.all(calls().map(({ closed }) => closed));
          const lastEnd = Math.max(...calls().map(({ endedAt = Infinity }) => endedAt));
          await yardstick.expectAtMost(lastEnd - acknowledged, 1000, 'cutting off the models');
          expect(calls()).toHaveLength(8);
        }
      }, HANG_MS);
    },
    HANG_MS + 10_000,
  );
});

import { randomUUID } from 'node:crypto';
import { beforeAll, describe, expect, it } from '@jest/globals';
import type { BatchAcceptedDto } from '../../src/batches/batches.dto.js';
import { BatchRoutes, byItem, faultsOfMerged } from '../support/batches.js';
import { CallLedger, answerOf } from '../support/call-ledger.js';
import { saying } from '../support/deployments.js';
import { textOf, until } from '../support/studio.js';
import { itemsOf, queriesOf } from '../support/with-batches.js';
import { withStudio } from '../support/with-studio.js';

const PIECES = 3;
const ledger = new CallLedger();
const system = withStudio({
  upstream: ledger,
  providers: { gone: { base_url: 'http://127.0.0.1:9/v1' } },
  others: { second: {} },
});
const first = new BatchRoutes(system.studio);
const second = new BatchRoutes(system.others.second.studio);
let deployment: string;

beforeAll(async () => {
  deployment = await deploy();
});

const deploy = (runtime_config: object = {}, pauseMs = 1) =>
  first.studio.deploy({ agents: [ledger.agent('a', PIECES, pauseMs)] }, runtime_config);

const callsOf = (queries: string[]) => ledger.calls.filter(({ marker }) => queries.includes(marker));
const openOf = (queries: string[]) => callsOf(queries).filter(({ endedAt }) => endedAt === undefined);

const untilEnded = (batchId: string, at = first) =>
  until(async () => {
    const batch = await at.get(batchId);
    return batch.status === 'running' ? undefined : batch;
  });

/** The most calls of these queries that there were at once, by their own account of their times. */
function peakOf(queries: string[]): number {
  const calls = callsOf(queries);
  const at = (moment: number) =>
    calls.filter(({ begunAt, endedAt = Infinity }) => begunAt <= moment && moment < endedAt).length;
  return Math.max(...calls.map(({ begunAt }) => at(begunAt)));
}

describe('concurrency', () => {
  it('of 1 runs the items one after the other, in their order, also over two processes', async () => {
    const queries = queriesOf(12);
    const stream = await second.stream({
      deployment_name: deployment,
      items: itemsOf(queries),
      concurrency: 1,
    });
    const frames = await stream.frames();
    expect(faultsOfMerged(frames, stream.executionId)).toEqual([]);
    expect(callsOf(queries).map(({ marker }) => marker)).toEqual(queries);
    expect(peakOf(queries)).toBe(1);
    // No item says anything but its first chunk before the one in front of it has ended.
    const said = frames.filter(({ chunk }) => chunk.type === 'content').map(({ chunk }) => chunk.item_id);
    expect(said).toEqual(said.toSorted((one, other) => Number(one) - Number(other)));
  });

  it('is never exceeded at the model, and is made use of', async () => {
    const queries = queriesOf(40);
    queries.slice(0, 4).forEach((query) => ledger.hold(query));
    const { batch_id } = await first.accept({
      deployment_name: deployment,
      items: itemsOf(queries),
      concurrency: 4,
    });
    await until(() => callsOf(queries).length === 4);
    const { counts } = await second.get(batch_id);
    expect([counts.running, counts.queued]).toEqual([4, 36]);
    // Its results can be read meanwhile.
    const results = await second.results(batch_id);
    expect(results.map(({ status }) => status)).toEqual([
      ...Array<string>(4).fill('running'),
      ...Array<string>(36).fill('queued'),
    ]);
    for (const result of results) expect(result).not.toHaveProperty('response');
    ledger.letGo(queries[2] ?? '');
    await until(() => callsOf(queries).length >= 20);
    expect(openOf(queries.slice(0, 4))).toHaveLength(3);
    queries.forEach((query) => ledger.letGo(query));
    expect(await untilEnded(batch_id, second)).toMatchObject({ counts: { completed: 40 } });
    expect(callsOf(queries)).toHaveLength(40);
    expect(peakOf(queries)).toBe(4);
  });

  it('lets another batch and single executions pass', async () => {
    const [slow, quick, single] = [queriesOf(5), queriesOf(3), queriesOf(1)[0] ?? ''];
    slow.forEach((query) => ledger.hold(query));
    const { batch_id } = await first.accept({
      deployment_name: deployment,
      items: itemsOf(slow),
      concurrency: 1,
    });
    await ledger.call(slow[0] ?? '');
    const other = await first.accept({ deployment_name: deployment, items: itemsOf(quick) });
    await untilEnded(other.batch_id);
    const executed = await first.studio.execute({ deployment_name: deployment, query: single });
    expect(executed.status).toBe(200);
    expect(callsOf(slow)).toHaveLength(1);
    slow.forEach((query) => ledger.letGo(query));
    expect(await untilEnded(batch_id)).toMatchObject({ counts: { completed: 5 } });
  });
});

describe('max_concurrency of the deployment', () => {
  it.each([1, 3])('of %d holds for the items of batches, whatever concurrency they ask for', async (most) => {
    const limited = await deploy({ max_concurrency: most }, 20);
    const [some, others] = [queriesOf(8), queriesOf(8)];
    const firstOnes = some.slice(0, most);
    firstOnes.forEach((query) => ledger.hold(query));
    const accepted = [
      await first.accept({ deployment_name: limited, items: itemsOf(some), concurrency: 4 }),
      await second.accept({ deployment_name: limited, items: itemsOf(others) }),
    ];
    // As many as there are places are under way at once.
    await until(() => callsOf(firstOnes).length === most || undefined);
    firstOnes.forEach((query) => ledger.letGo(query));
    for (const { batch_id } of accepted) {
      expect(await untilEnded(batch_id)).toMatchObject({ counts: { completed: 8 } });
    }
    expect(callsOf([...some, ...others])).toHaveLength(16);
    expect(peakOf([...some, ...others])).toBe(most);
    // In the order of their acceptance, where there is only one place.
    if (most === 1) {
      expect(callsOf([...some, ...others]).map(({ marker }) => marker)).toEqual([...some, ...others]);
    }
  });
});

describe('an item that is cancelled by itself', () => {
  it('ends alone, whether it runs or waits, and gives its place to the next one', async () => {
    const queries = queriesOf(5);
    queries.forEach((query) => ledger.hold(query));
    const stream = await first.stream({
      deployment_name: deployment,
      items: itemsOf(queries),
      concurrency: 2,
    });
    const batchId = stream.executionId;
    const { items } = await first.get(batchId);
    const cancel = (index: number) =>
      second.studio.json(`/api/executions/${items[index]?.execution_id}/cancel`, { method: 'POST' });
    await until(() => callsOf(queries).length === 2);
    expect((await cancel(3)).status).toBe(202);
    expect(callsOf(queries)).toHaveLength(2);
    expect((await cancel(0)).status).toBe(202);
    await ledger.call(queries[2] ?? '');
    queries.forEach((query) => ledger.letGo(query));
    const frames = await stream.frames();
    expect(faultsOfMerged(frames, batchId)).toEqual([]);
    expect(frames.at(-1)?.chunk).toMatchObject({
      status: 'completed',
      data: { counts: { completed: 3, cancelled: 2, error: 0 } },
    });
    expect([...byItem(frames)].map(([item, chunks]) => [item, chunks.at(-1)?.chunk.status])).toEqual(
      expect.arrayContaining([
        ['0', 'cancelled'],
        ['3', 'cancelled'],
        ['4', 'completed'],
      ]),
    );
    expect(callsOf([queries[3] ?? ''])).toEqual([]);
    expect((await cancel(1)).status).toBe(409);
  });
});

describe('MAX_QUEUED', () => {
  const small = withStudio({ env: { ROLE: 'api', MAX_QUEUED: '10' } });
  const at = new BatchRoutes(small.studio);

  it('refuses a batch as a whole, and a batch that could never fit says so', async () => {
    const name = await at.studio.deploy(saying('x'));
    const queries = queriesOf(8);
    const body = { deployment_name: name, items: itemsOf(queries) };
    const headers = { 'Idempotency-Key': randomUUID() };
    const { batch_id } = await at.accept(body, headers);
    for (const path of ['/api/workflows/execute/batch', '/api/workflows/execute/batch/stream']) {
      const refused = await at.ask({ ...body, items: itemsOf(queriesOf(3)) }, {}, path);
      expect([refused.status, refused.body.code]).toEqual([429, 'queue_full']);
      expect(Number(refused.headers.get('retry-after'))).toBeGreaterThan(0);
    }
    const rows = await small.database.query('SELECT 1 FROM execution');
    expect(rows).toHaveLength(8);
    // What was accepted before is not refused now.
    expect((await at.ask<BatchAcceptedDto>(body, headers)).body.batch_id).toBe(batch_id);
    expect(await at.accept({ ...body, items: itemsOf(queriesOf(2)) })).toBeDefined();
    const never = await at.ask({ ...body, items: itemsOf(queriesOf(11)) });
    expect([never.status, never.body.errors?.[0]?.pointer]).toEqual([400, '/items']);
  });
});

describe('on_item_error', () => {
  /** Its model is not there: the call fails. */
  const failing = (query: string) => ({ query, runtime_overrides: { model: 'gone/any' } });

  it('"continue" runs all others, and says which failed and why', async () => {
    const queries = queriesOf(20);
    const items = queries.map((query, index) => (index % 4 === 1 ? failing(query) : { query }));
    const stream = await first.stream({ deployment_name: deployment, items, concurrency: 3 });
    const frames = await stream.frames();
    expect(faultsOfMerged(frames, stream.executionId)).toEqual([]);
    expect(frames.at(-1)?.chunk).toMatchObject({
      status: 'completed',
      data: { counts: { total: 20, completed: 15, error: 5, cancelled: 0 } },
    });
    const results = await first.results(stream.executionId);
    results.forEach((result, index) => {
      const expected =
        index % 4 === 1
          ? { index, status: 'error', error: { code: 'model_error', message: expect.any(String) } }
          : { index, status: 'completed', response: answerOf(queries[index] ?? '', 'a', PIECES) };
      expect(result).toMatchObject(expected);
    });
  });

  it('"stop" lets finish what runs, and begins nothing after a failure', async () => {
    const queries = queriesOf(10);
    const [held = '', ...others] = queries;
    ledger.hold(held);
    const items = [{ query: held }, failing(others[0] ?? ''), ...itemsOf(others.slice(1))];
    const body = { deployment_name: deployment, items, concurrency: 2, on_item_error: 'stop' };
    const stream = await first.stream(body);
    const batchId = stream.executionId;
    await until(async () => (await first.get(batchId)).counts.cancelled === 8 || undefined);
    expect((await first.get(batchId)).status).toBe('running');
    ledger.letGo(held);
    const frames = await stream.frames();
    expect(faultsOfMerged(frames, batchId)).toEqual([]);
    const batch = await first.get(batchId);
    expect(batch.status).toBe('completed');
    expect(batch.items.map(({ status }) => status)).toEqual([
      'completed',
      'error',
      ...Array<string>(8).fill('cancelled'),
    ]);
    expect(textOf(byItem(frames).get('0') ?? [])).toBe(answerOf(held, 'a', PIECES));
    expect(callsOf(others)).toEqual([]);
  });

  it('"stop" begins nothing, though an item fails while the next ones are let go', async () => {
    const queries = queriesOf(6);
    const [running = '', ...others] = queries;
    ledger.hold(running);
    const items = [{ query: running, runtime_overrides: { timeout: 4 } }, ...itemsOf(others)];
    const { batch_id } = await first.accept({
      deployment_name: deployment,
      items,
      concurrency: 1,
      on_item_error: 'stop',
    });
    await ledger.call(running);
    // Holds up what lets items go between its look at the failures and its own; the item fails meanwhile, by its timeout.
    await system.database.whileLocked('deployment_revision', 'ACCESS EXCLUSIVE', async () => {
      await until(async () => {
        const rows = await system.database.query(
          `SELECT 1 FROM pg_stat_activity
            WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%LIMIT room.places%'`,
        );
        const [item] = await system.database.query<{ status: string }>(
          'SELECT status FROM execution WHERE batch_id = $1 AND batch_index = 0',
          [batch_id],
        );
        return (rows.length > 0 && item?.status === 'error') || undefined;
      });
    });
    const batch = await untilEnded(batch_id);
    expect(batch.items.map(({ status }) => status)).toEqual(['error', ...Array<string>(5).fill('cancelled')]);
    expect(callsOf(others)).toEqual([]);
    // Were one of them let go, a worker that is quick enough would have begun it.
    const letGo = await system.database.query(
      'SELECT batch_index FROM execution WHERE batch_id = $1 AND batch_index > 0 AND NOT held',
      [batch_id],
    );
    expect(letGo).toEqual([]);
    ledger.letGo(running);
  });
});

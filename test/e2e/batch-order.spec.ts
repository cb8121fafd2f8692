import { randomInt, randomUUID } from 'node:crypto';
import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { startTestApp } from '../support/app.js';
import type { TestApp } from '../support/app.js';
import { BatchRoutes, faultsOfMerged, linesOf } from '../support/batches.js';
import { CallLedger, markerOf } from '../support/call-ledger.js';
import { itInFull } from '../support/effort.js';
import { Random } from '../support/random.js';
import { Studio, until } from '../support/studio.js';

/** Pieces that a model says before it is held, and in all. */
const SAID = 3;
const PIECES = 6;

let ledger: CallLedger;
let server: TestApp;
let api: TestApp;
let batches: BatchRoutes;
/** The same database, by a process that runs nothing itself: all that it knows it has heard or read. */
let elsewhere: BatchRoutes;
let deployment: string;

beforeAll(async () => {
  ledger = await CallLedger.start();
  const env = { MODEL_PROVIDERS: ledger.providers };
  // What is said at once is one row.
  server = await startTestApp({ ...env, STREAM_FLUSH_INTERVAL_MS: '100' });
  api = await startTestApp({ ...env, ROLE: 'api' }, server.database);
  batches = new BatchRoutes(new Studio(server.url));
  elsewhere = new BatchRoutes(new Studio(api.url));
  deployment = await batches.studio.deploy({ agents: [ledger.agent('a', PIECES, 1)] });
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

/** Begins a batch whose items have all said {@link SAID} pieces. */
async function begin(count: number) {
  const queries = queriesOf(count);
  queries.forEach((query) => ledger.hold(query, SAID));
  const { batch_id } = await batches.accept({ deployment_name: deployment, items: itemsOf(queries) });
  const ids = await until(async () => {
    const items = await positionsOf(batch_id);
    return items.every(({ last }) => last === 1 + SAID)
      ? items.map(({ execution_id }) => execution_id)
      : undefined;
  });
  return { queries, batchId: batch_id, ids };
}

const positionsOf = (batchId: string) =>
  server.database.query<{ execution_id: string; last: number }>(
    `SELECT execution_id, (SELECT max(last_sequence) FROM execution_chunk AS c WHERE c.execution_id = e.execution_id) AS last
       FROM execution AS e WHERE batch_id = $1 ORDER BY batch_index`,
    [batchId],
  );

/** How many positions the stored order of a batch has. */
async function mergedOf(batchId: string): Promise<number> {
  const [row] = await server.database.query<{ last: number | null }>(
    'SELECT max(last_position) AS last FROM batch_order WHERE batch_id = $1',
    [batchId],
  );
  return row?.last ?? 0;
}

const notify = (payload: string) =>
  server.database.query("SELECT pg_notify('agent_studio_log', $1)", [payload]);

describe('a worker that was overtaken while another process merges its batch', () => {
  it('is not believed: the merged stream ends, with what is in the log', async () => {
    const { queries, batchId, ids } = await begin(2);
    const [executionId = ''] = ids;
    const reading = elsewhere.whole(batchId);
    await until(async () => (await mergedOf(batchId)) === 1 + 2 * (1 + SAID));
    // Another attempt has it from here on, and says less: what this one still says is refused.
    await server.database.query(
      'UPDATE execution SET fence = fence + 1, cancel_requested_at = now() WHERE execution_id = $1',
      [executionId],
    );
    queries.forEach((query) => ledger.letGo(query));
    const there = await reading;
    expect(faultsOfMerged(there, batchId)).toEqual([]);
    expect(there.filter(({ chunk }) => chunk.status === 'cancelled')).toHaveLength(1);
    expect(linesOf(await batches.whole(batchId))).toEqual(linesOf(there));
  });
});

describe('what is heard of a log that is not so', () => {
  const seed = Number(process.env.SEED ?? randomInt(2 ** 31));

  itInFull(`makes no reader wait, and none miss or repeat anything (SEED=${seed})`, async () => {
    const random = new Random(seed);
    const { queries, batchId, ids } = await begin(5);
    const readings = [batches, elsewhere].flatMap((at) => [at.whole(batchId), at.whole(batchId)]);
    const single = elsewhere.studio.follow(ids[0] ?? '').then((stream) => stream.frames());
    const sender = randomUUID();
    const logs = [batchId, ...ids, randomUUID(), 'x', ''];
    const lasts = [
      '-1',
      '0',
      '1',
      '2',
      '3',
      '99',
      '2147483647',
      '99999999999',
      '1e9',
      'NaN',
      'Infinity',
      '',
      ' ',
      '7:8',
      '0x10',
    ];
    const payloads = () => {
      const positions = Array.from(
        { length: 1 + random.int(0, 19) },
        () => `${random.pick(logs)}:${random.pick(lasts)}`,
      );
      const from = random.pick([sender, sender, sender, randomUUID(), '', 'nobody']);
      return random.pick([
        `${from} ${positions.join()}`,
        `${from} ${positions.join()}`,
        positions.join(' '),
        from,
        ',,,',
        ' ',
      ]);
    };
    for (const query of queries) {
      for (let count = 0; count < 40; count++) await notify(payloads());
      ledger.letGo(query);
    }
    const done = until(async () => (await batches.get(batchId)).status === 'completed');
    while (!(await Promise.race([done, notify(payloads()).then(() => false)])));
    const [first = [], ...others] = await Promise.all(readings);
    expect(faultsOfMerged(first, batchId)).toEqual([]);
    others.forEach((frames) => expect(linesOf(frames)).toEqual(linesOf(first)));
    expect(await single).toHaveLength(2 + PIECES);
  });
});

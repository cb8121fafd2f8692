import { randomUUID } from 'node:crypto';
import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { startTestApp } from '../support/app.js';
import type { TestApp } from '../support/app.js';
import { BatchRoutes, faultsOfMerged, linesOf } from '../support/batches.js';
import { CallLedger, markerOf } from '../support/call-ledger.js';
import { saying } from '../support/deployments.js';
import { Studio, until } from '../support/studio.js';
import type { Frame } from '../support/studio.js';

let ledger: CallLedger;
let server: TestApp;
let api: TestApp;
let batches: BatchRoutes;
/** The same database, by a process that runs nothing itself. */
let elsewhere: BatchRoutes;
let deployment: string;

beforeAll(async () => {
  ledger = await CallLedger.start();
  const env = { MODEL_PROVIDERS: ledger.providers };
  server = await startTestApp(env);
  api = await startTestApp({ ...env, ROLE: 'api' }, server.database);
  batches = new BatchRoutes(new Studio(server.url));
  elsewhere = new BatchRoutes(new Studio(api.url));
  deployment = await batches.studio.deploy({ agents: [ledger.agent('a', 6, 1)] });
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
    const idle = await startTestApp({ ROLE: 'api' });
    try {
      const at = new BatchRoutes(new Studio(idle.url));
      const items = itemsOf(['x', 'y', 'z']);
      const name = await at.studio.deploy(saying('x'));
      const stream = await at.stream({ deployment_name: name, items });
      const frames: Frame[] = [];
      for await (const frame of stream) {
        frames.push(frame);
        // What another process would write, all at once, and what is heard of it.
        if (frames.length === 1 + items.length) await endAll(idle, frames);
      }
      expect(frames.map(({ chunk }) => [chunk.item_id, chunk.sequence])).toEqual([
        [undefined, 1],
        ...items.map(() => [expect.any(String), 1]),
        ...items.map(() => [expect.any(String), 2]),
        [undefined, 2],
      ]);
    } finally {
      await idle.close();
    }
  });

  /** Ends a batch and its items, whose first chunks these are, and tells only of the batch. */
  async function endAll({ database }: TestApp, firsts: Frame[]): Promise<void> {
    const [batchId = ''] = firsts.map(({ chunk }) => chunk.batch_id);
    const ids = firsts.map(({ chunk }) => chunk.execution_id ?? batchId);
    const lasts = firsts.map(({ data }) =>
      data.replace('"status":"started"', '"status":"completed"').replace('"sequence":1', '"sequence":2'),
    );
    await database.query(
      `WITH items AS (UPDATE execution SET status = 'completed', finished_at = now(), last_sequence = 2 WHERE batch_id = $1),
            ended AS (UPDATE batch SET status = 'completed', finished_at = now() WHERE batch_id = $1)
       INSERT INTO execution_chunk SELECT id, 2, 2, chunk FROM unnest($2::uuid[], $3::text[]) AS last (id, chunk)`,
      [batchId, ids, lasts],
    );
    await database.query("SELECT pg_notify('agent_studio_log', $1)", [`${randomUUID()} ${batchId}:2`]);
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

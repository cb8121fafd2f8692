import type { ServerResponse } from 'node:http';
import { randomUUID } from 'node:crypto';
import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import fc from 'fast-check';
import { createTestDatabase } from '../support/database.js';
import type { TestDatabase } from '../support/database.js';
import { BatchRoutes, STREAM_BATCH, byItem, faultsOfMerged } from '../support/batches.js';
import { CallLedger, answerOf, markerOf } from '../support/call-ledger.js';
import { RawClient } from '../support/raw-client.js';
import { ServerProcess } from '../support/studio-process.js';
import { Studio, textOf, until, untilPasses, upstreamAgent } from '../support/studio.js';
import { Upstream, chatDelta, chatEnd, writeStream } from '../support/upstream.js';

const ITEMS = 3;
const PIECES = 20;
/** After so long nothing may be left of a thousand clients. */
const FREED_MS = 60_000;
const WAVES = 9;
/** Clients of a wave that leave in the middle of the stream, and as many that leave before its first byte. */
const HALF_WAVE = 25;
/** Timers and sockets that the pools, the queue and the notifications open and close by themselves. */
const OWN_TRAFFIC = 10;

let ledger: CallLedger;
let upstream: Upstream;
let database: TestDatabase;
let worker: ServerProcess;
let api: ServerProcess;
let batches: BatchRoutes;
let speaking: string;
let silent: string;
/** Answers of the model that have begun and say nothing more. */
const open: ServerResponse[] = [];

beforeAll(async () => {
  ledger = await CallLedger.start();
  upstream = await Upstream.start((response) => {
    writeStream(response, chatDelta('word'));
    open.push(response);
  });
  database = await createTestDatabase();
  // The process with the clients runs nothing, so that what it has open afterwards was left by them.
  worker = await startServer({ ROLE: 'worker', JOB_LOCK_MS: '60000' });
  api = await startServer({ ROLE: 'api', DATABASE_POOL_SIZE: String(HALF_WAVE + OWN_TRAFFIC) });
  batches = new BatchRoutes(new Studio(api.url));
  speaking = await batches.studio.deploy({ agents: [ledger.agent('a', PIECES, 2)] });
  silent = await batches.studio.deploy(upstreamAgent({ model: 'silent/any' }));
});
afterAll(async () => {
  await Promise.all([worker, api].map((server) => server.stop('SIGKILL')));
  await database.drop();
  await ledger.stop();
  await upstream.stop();
});

/** A server that sends nothing of its own accord, and whose models may be silent for as long as they like. */
function startServer(env: Record<string, string>): Promise<ServerProcess> {
  const providers = {
    ...(JSON.parse(ledger.providers) as object),
    silent: { type: 'openai-compatible', base_url: upstream.url, timeout_ms: 600_000 },
  };
  return ServerProcess.start({
    DATABASE_URL: database.url,
    MODEL_PROVIDERS: JSON.stringify(providers),
    HEARTBEAT_INTERVAL_MS: '3600000',
    STREAM_FLUSH_INTERVAL_MS: '1',
    // The database is held up on purpose, for as long as it takes to look at everything.
    DATABASE_TIMEOUT_MS: '600000',
    ...env,
  });
}

const itemsOf = (queries: string[]) => queries.map((query) => ({ query }));
const follow = (batchId: string) => new RawClient(`${api.url}/api/batches/${batchId}/stream`);
const start = (body: object) => new RawClient(api.url + STREAM_BATCH, body);

describe('four of five readers leave a batch at random moments and the fifth has everything', () => {
  const leaver = fc.record({ after: fc.integer({ min: 1, max: ITEMS * PIECES }), resets: fc.boolean() });
  const leavers = fc.array(leaver, { minLength: 4, maxLength: 4 });

  it.each([
    ['the client that started the batch stays', 0],
    ['the client that started the batch leaves', 4],
  ])('%s', async (_name, indexOfFifth) => {
    const round = async (leaving: { after: number; resets: boolean }[]) => {
      const name = randomUUID();
      const queries = Array.from({ length: ITEMS }, (_, index) => markerOf(`${name}-${index}`));
      queries.forEach((query) => ledger.hold(query, 1));
      const starter = start({ deployment_name: speaking, items: itemsOf(queries) });
      await starter.read(1);
      const { executionId: batchId } = starter;
      const clients = [starter, ...leaving.map(() => follow(batchId))];
      await Promise.all(clients.map((client) => client.read(2)));
      const [fifth] = clients.splice(indexOfFifth, 1);
      const left = clients.map(async (client, index) => {
        await client.read(leaving[index]?.after ?? 0);
        expect(client.isOver).toBe(false);
        if (leaving[index]?.resets) client.reset();
        else client.close();
      });
      // All that the models have to say, but not that they have ended: that comes when all have left.
      queries.forEach((query) => ledger.letGo(query, 1));
      await Promise.all(left);
      queries.forEach((query) => ledger.letGo(query));
      const frames = (await fifth?.whole()) ?? [];
      expect(faultsOfMerged(frames, batchId)).toEqual([]);
      const chunks = byItem(frames);
      queries.forEach((query, index) =>
        expect(textOf(chunks.get(String(index)) ?? [])).toBe(answerOf(query, 'a', PIECES)),
      );
    };
    await fc.assert(fc.asyncProperty(leavers, round), { numRuns: 10, endOnFailure: true, timeout: 60_000 });
  });
});

/** What the api process has open for clients, as it says itself and the kernel does. */
async function openFor() {
  const streams = await api.metric('agent_studio_open_streams');
  return { connections: await api.clientConnections(), streams };
}

/** What its memory still holds for them after a garbage collection: exact, and each of it 0 in a server that has none. */
async function heldFor() {
  // The two that are always there are the prototypes that Express makes of the class.
  const responses = (await api.held('node:http', 'ServerResponse')).count - 2;
  const readers = (await api.held('event-log/log-subscriptions.js', 'LogSubscription')).count;
  const mergers = (await api.held('event-log/merger.js', 'Merger')).count;
  return { responses, readers, mergers };
}

const NOTHING_OPEN = { connections: 0, streams: 0 };
const NOTHING_HELD = { responses: 0, readers: 0, mergers: 0 };

const untilOpen = (expected: typeof NOTHING_OPEN) =>
  untilPasses(async () => expect(await openFor()).toEqual(expected));

const silentBatch = (items: number) => ({
  deployment_name: silent,
  items: Array.from({ length: items }, () => ({ query: 'x' })),
});

/** Resolves when this many statements wait for a lock of {@link TestDatabase.whileLocked}. */
async function untilHeldUp(count: number, statement: string): Promise<void> {
  await until(async () => {
    const rows = await database.query(
      `SELECT 1 FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock' AND strpos(query, $1) > 0`,
      [statement],
    );
    return rows.length >= count || undefined;
  });
}

describe('a client of a batch that vanishes while nothing happens is noticed, and nothing is kept for it', () => {
  it('in the middle of a POST stream, and of a GET stream', async () => {
    const starter = start(silentBatch(2));
    await starter.read(5);
    const reader = follow(starter.executionId);
    await reader.read(5);
    await untilOpen({ connections: 2, streams: 2 });
    starter.reset();
    await untilOpen({ connections: 1, streams: 1 });
    await untilPasses(async () => expect(await heldFor()).toEqual({ responses: 1, readers: 1, mergers: 1 }));
    reader.reset();
    await untilOpen(NOTHING_OPEN);
  });

  it.each([
    ['its acceptance', 'execution', 'INSERT INTO execution (', () => start(silentBatch(2))],
    ['the list of its items', 'execution', 'ORDER BY batch_index', undefined],
    ['the merged order', 'batch_order', 'batch_order', undefined],
  ])('before the first byte, while the database holds up %s', async (_name, table, statement, begin) => {
    const { batch_id } = await batches.accept(silentBatch(2));
    await database.whileLocked(table, begin ? 'SHARE' : 'ACCESS EXCLUSIVE', async () => {
      const client = begin?.() ?? follow(batch_id);
      await untilHeldUp(1, statement);
      client.reset();
      await untilOpen(NOTHING_OPEN);
    });
    await untilOpen(NOTHING_OPEN);
  });

  it('in the middle of the results of a large batch', async () => {
    const { batch_id } = await batches.accept(silentBatch(100));
    await database.query(
      `UPDATE execution SET response = to_json(repeat('x', 200000)) WHERE batch_id = $1 AND batch_index > 2`,
      [batch_id],
    );
    const client = new RawClient(`${api.url}/api/batches/${batch_id}/results`);
    await until(() => client.bytesRead > 100_000 || undefined);
    client.stall();
    await untilOpen({ connections: 1, streams: 0 });
    client.reset();
    await untilOpen(NOTHING_OPEN);
    expect((await batches.cancel(batch_id)).status).toBe(202);
  });

  it('and none of them is in memory any more', async () => {
    await untilPasses(async () => expect(await heldFor()).toEqual(NOTHING_HELD));
  });
});

/** What a server has open in all, and its PostgreSQL with it. */
async function openInAll() {
  const sessions = await database.query<{ state: string | null }>(
    'SELECT state FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()',
  );
  return {
    descriptors: await api.openDescriptors(),
    sockets: await api.metric('nodejs_active_handles', '{type="Socket"}'),
    timers: await api.metric('nodejs_active_resources', '{type="Timeout"}'),
    databaseConnections: sessions.length,
    transactions: sessions.filter(({ state }) => state?.includes('transaction')).length,
  };
}

it('500 clients of a batch that reset their connections leave nothing open, though nothing happens after that', async () => {
  const { batch_id } = await batches.accept(silentBatch(20));
  await until(async () => (await batches.get(batch_id)).counts.running === 20 || undefined);
  const read = { inTheMiddle: 0, nothing: 0 };
  const wave = async () => {
    const middle = Array.from({ length: HALF_WAVE }, () => follow(batch_id));
    await Promise.all(middle.map((client) => client.read(10)));
    await database.whileLocked('batch_order', 'ACCESS EXCLUSIVE', async () => {
      const beginning = Array.from({ length: HALF_WAVE }, () => follow(batch_id));
      await untilHeldUp(HALF_WAVE, 'batch_order');
      read.inTheMiddle += middle.filter((client) => client.frames >= 10 && !client.isOver).length;
      read.nothing += beginning.filter((client) => client.bytesRead === 0 && !client.isOver).length;
      for (const client of [...middle, ...beginning]) client.reset();
    });
  };
  await wave(); // so that the pools have the size that a wave takes
  await untilOpen(NOTHING_OPEN);
  const before = await openInAll();
  for (let count = 0; count < WAVES; count++) await wave();
  const started = (WAVES + 1) * HALF_WAVE;
  expect(read).toEqual({ inTheMiddle: started, nothing: started });
  await untilPasses(async () => {
    expect(await openFor()).toEqual(NOTHING_OPEN);
    const after = await openInAll();
    expect(after.transactions).toBe(0);
    expect(after.descriptors).toBeLessThan(before.descriptors + OWN_TRAFFIC);
    expect(after.sockets).toBeLessThan(before.sockets + OWN_TRAFFIC);
    expect(after.timers).toBeLessThan(before.timers + OWN_TRAFFIC);
    expect(after.databaseConnections).toBeLessThan(before.databaseConnections + OWN_TRAFFIC);
  }, FREED_MS);
  await untilPasses(async () => expect(await heldFor()).toEqual(NOTHING_HELD));

  // They have harmed no item either: each one goes on without its clients.
  for (const response of open) {
    writeStream(response, chatEnd());
    response.end();
  }
  await until(async () => (await batches.get(batch_id)).status === 'completed' || undefined);
  expect(faultsOfMerged(await batches.whole(batch_id), batch_id)).toEqual([]);
}, 100_000);

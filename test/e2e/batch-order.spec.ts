import { randomInt, randomUUID } from 'node:crypto';
import { beforeAll, describe, expect, it } from '@jest/globals';
import { Client, Pool } from 'pg';
import { MergedOrder, appendRows } from '../../src/event-log/merged-order.js';
import { cutOrder } from '../../src/event-log/order-repair.js';
import { SessionConnection } from '../../src/database/session-connection.js';
import { faultsOfMerged, linesOf } from '../support/batches.js';
import type { BatchRoutes } from '../support/batches.js';
import { itInFull } from '../support/effort.js';
import { Random } from '../support/random.js';
import { isTerminal, until } from '../support/studio.js';
import type { Frame } from '../support/studio.js';
import { itemsOf, queriesOf, withBatches } from '../support/with-batches.js';

/** Pieces that a model says before it is held, and in all. */
const SAID = 3;
const PIECES = 6;

const { ledger, server, batches, elsewhere } = withBatches({ STREAM_FLUSH_INTERVAL_MS: '100' });
let deployment: string;

beforeAll(async () => {
  deployment = await batches.studio.deploy({ agents: [ledger.agent('a', PIECES, 1)] });
});

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

/** Items of each batch below. */
const ITEMS = 3;
/** Chunks of an item, and of the whole batch. */
const OF_ITEM = PIECES + 2;
const OF_BATCH = 2 + ITEMS * OF_ITEM;

/** A batch that nobody has read, and that has ended unless its items are held after so many pieces. */
async function unread(said?: number) {
  const queries = queriesOf(ITEMS);
  if (said !== undefined) queries.forEach((query) => ledger.hold(query, said));
  const { batch_id: batchId } = await batches.accept({
    deployment_name: deployment,
    items: itemsOf(queries),
  });
  const last = said === undefined ? OF_ITEM : 1 + said;
  await until(async () => (await lastsOf(batchId)).every((found) => found === last));
  if (said === undefined) await until(async () => (await batches.get(batchId)).status === 'completed');
  return { batchId, letGo: () => queries.forEach((query) => ledger.letGo(query)) };
}

async function lastsOf(batchId: string): Promise<number[]> {
  const rows = await server.database.query<{ last: number }>(
    `SELECT (SELECT max(last_sequence) FROM execution_chunk AS c WHERE c.execution_id = e.execution_id) AS last
       FROM execution AS e WHERE batch_id = $1`,
    [batchId],
  );
  return rows.map(({ last }) => last);
}

/** Stores an order as an older build did, which did not look whether the logs hold it. @returns its last position */
async function store(batchId: string, rows: string[], { checkpoint }: { checkpoint?: number } = {}) {
  let position = 0;
  const merged = Array.from({ length: 1 + ITEMS }, () => 0);
  for (const [index, parts] of rows.entries()) {
    const first = position + 1;
    for (const part of parts.split(',')) {
      const [member = 0, from = 0, to = 0] = part.split(/[:-]/).map(Number);
      position += to - from + 1;
      merged[member] = to;
    }
    await server.database.query('INSERT INTO batch_order VALUES ($1, $2, $3, $4, $5)', [
      batchId,
      first,
      position,
      parts,
      index === checkpoint ? merged : null,
    ]);
  }
  return position;
}

/** The merged stream, by a client that comes again until it has all of it. */
async function persistently(at: BatchRoutes, batchId: string): Promise<Frame[]> {
  const frames: Frame[] = [];
  const isWhole = () => frames.some((frame) => isTerminal(frame) && frame.chunk.item_id === undefined);
  for (let tries = 0; tries < 20 && !isWhole(); tries++) {
    const stream = await at.follow(batchId, frames.length === 0 ? undefined : frames.length);
    expect(stream.response.status).toBe(200);
    frames.push(...(await stream.frames()));
  }
  return frames;
}

/** `<item>:<sequence>` of each chunk, where the item is known by its place in the request. */
function placesOf(frames: Frame[]): string[] {
  const { items = [] } = (frames[0]?.chunk.data ?? {}) as { items?: { item_id: string }[] };
  return frames.map(({ chunk }) => {
    const member = items.findIndex(({ item_id }) => item_id === chunk.item_id) + 1;
    return `${member}:${chunk.sequence}`;
  });
}

const HALF = '0:1-1,1:1-3,2:1-4';
const END = '0:2-2';

describe('a stored order with a range that no log holds', () => {
  it.each([
    ['in the middle of a row', [HALF, '3:1-3,1:4-20,2:5-8', '3:4-8', END], 1 + 3 + 4 + 3 + 5],
    ['at the end of a row', [HALF, '3:1-3,2:5-8,1:4-9', '3:4-8', END], 1 + 3 + 4 + 3 + 4 + 5],
    ['in its first row', ['0:1-1,2:1-9', '1:1-8,3:1-8', END], 1 + 8],
    ['as a row of its own', [HALF, '1:4-8', '1:9-40', '3:1-8,2:5-8', END], 1 + 3 + 4 + 5],
    ['as its last row', [HALF, '3:1-8', '2:5-8,1:4-11'], 1 + 3 + 4 + 8 + 4 + 5],
  ])('%s is cut there, and made again', async (_where, rows, left) => {
    const { batchId } = await unread();
    const end = await store(batchId, rows, { checkpoint: rows.length - 2 });
    const [first = [], ...others] = await Promise.all(
      [batches, elsewhere, batches].map((at) => persistently(at, batchId)),
    );
    expect(faultsOfMerged(first, batchId)).toEqual([]);
    expect(first).toHaveLength(OF_BATCH);
    others.forEach((frames) => expect(linesOf(frames)).toEqual(linesOf(first)));
    // What a client may have had is what it was.
    const stored = rows.flatMap((parts) => parts.split(',')).flatMap(placesIn);
    expect(placesOf(first).slice(0, left)).toEqual(stored.filter(isHeld).slice(0, left));
    const past = await elsewhere.follow(batchId, end);
    expect(past.response.status).toBe(400);
    expect(await past.response.json()).toMatchObject({ code: 'invalid_cursor' });
  });

  function placesIn(part: string): string[] {
    const [member = 0, from = 0, to = 0] = part.split(/[:-]/).map(Number);
    return Array.from({ length: to - from + 1 }, (_, index) => `${member}:${from + index}`);
  }

  function isHeld(place: string): boolean {
    return Number(place.split(':')[1]) <= OF_ITEM;
  }

  it('sends a reader away who is past it, and then refuses it', async () => {
    const { batchId } = await unread();
    const end = await store(batchId, [HALF, '1:4-60', '3:1-8', END]);
    expect(await (await batches.follow(batchId, end - 5)).frames()).toEqual([]);
    expect((await batches.follow(batchId, end - 5)).response.status).toBe(400);
    expect(faultsOfMerged(await elsewhere.whole(batchId), batchId)).toEqual([]);
  });

  it('is cut while its items run, and again if an older build stores another one', async () => {
    const { batchId, letGo } = await unread(2);
    await store(batchId, ['0:1-1,1:1-3,2:1-7']);
    const readings = [batches, elsewhere].map((at) => persistently(at, batchId));
    const positions = () =>
      server.database.query<{ last: number }>(
        'SELECT max(last_position) AS last FROM batch_order WHERE batch_id = $1',
        [batchId],
      );
    const [{ last } = { last: 0 }] = await until(async () => {
      const found = await positions();
      return found[0]?.last === 1 + ITEMS * 3 ? found : undefined;
    });
    await server.database.query('INSERT INTO batch_order VALUES ($1, $2, $3, $4)', [
      batchId,
      last + 1,
      last + 97,
      '3:4-100',
    ]);
    letGo();
    const [first = [], second = []] = await Promise.all(readings);
    expect(faultsOfMerged(first, batchId)).toEqual([]);
    expect(first).toHaveLength(OF_BATCH);
    expect(linesOf(second)).toEqual(linesOf(first));
  });
});

describe('an order that was cut', () => {
  it('is not continued by those who knew it before, and older builds are made to begin anew', async () => {
    const { batchId } = await unread();
    await store(batchId, [HALF, '1:4-9']);
    const rows = await server.database.query<{ execution_id: string }>(
      'SELECT execution_id FROM execution WHERE batch_id = $1 ORDER BY batch_index',
      [batchId],
    );
    const members = [batchId, ...rows.map(({ execution_id }) => execution_id)];
    const connectionString = server.database.url;
    const pool = new Pool({ connectionString });
    const session = new SessionConnection({ connectionString, kind: 'merged-order', setup: [] });
    const older = await connectedAs('agent-studio', 'INSERT INTO batch_order SELECT FROM batch WHERE false');
    const between = await connectedAs('agent-studio/merged-log', 'SELECT 1');
    const bystander = await connectedAs('agent-studio', 'SELECT 1');
    try {
      const order = new MergedOrder(pool, batchId);
      const { cuts } = order;
      await order.newest();
      expect(await cutOrder(pool, batchId, { members, cuts })).toBe(8 + 5);
      await Promise.all([older.ended, between.ended]);
      expect((await bystander.client.query('SELECT 1')).rowCount).toBe(1);
      expect(await order.after(0)).toBeUndefined();
      const range = { member: 2, first: 5, last: 8 };
      const row = { batchId, members, first_position: 14, last_position: 17, ranges: [range] };
      const append = (known: number) =>
        appendRows(session, [
          { ...row, merged: undefined, cuts: known, signal: new AbortController().signal },
        ]);
      expect(await append(cuts)).toEqual([false]);
      expect(await append(cuts + 1)).toEqual([true]);
      // Another process that found the same is told that it was done.
      expect(await cutOrder(pool, batchId, { members, cuts })).toBeUndefined();
    } finally {
      await Promise.all([bystander.client.end(), session.close(), pool.end()]);
    }
  });

  async function connectedAs(application_name: string, statement: string) {
    const client = new Client({ connectionString: server.database.url, application_name });
    client.on('error', () => undefined);
    await client.connect();
    const ended = new Promise<void>((resolve) => client.once('end', resolve));
    await client.query(statement);
    return { client, ended };
  }
});

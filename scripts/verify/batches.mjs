/** Checks batches: accepted as a whole or not at all, one merged stream that can be resumed anywhere, results, and the end. */
import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import {
  checkChunk,
  checkFields,
  checkIds,
  checkOrigin,
  checkProblem,
  checkSequence,
  checkStreamHeaders,
  readEventsOf,
  readFrames,
  textOf,
} from './stream-rules.mjs';
import { QUERY } from './verification.mjs';

/** @typedef {import('./verification.mjs').Verification} Verification */
/** @typedef {import('./stream-rules.mjs').Frame} Frame */
/**
 * @typedef {object} Batch a batch that was streamed to its end
 * @property {string} batch_id
 * @property {string} path
 * @property {object} body what was asked
 * @property {Record<string, string>} headers with which
 * @property {Frame[]} frames of its merged stream
 */

/** With names and without, so that one is called by its index. */
const ITEMS = [{ query: 'one' }, { item_id: 'Zwei 2', query: QUERY }, { query: 'three' }];
const ITEM_IDS = ['0', 'Zwei 2', '2'];
/** Its end comes long after the cancellation. */
const MANY = 100;
const FAILING = { runtime_overrides: { variables: { ready: 'neither true nor false' } } };

const BATCH = '/api/workflows/execute/batch';
const OWN_FIELDS = ['type', 'data', 'status', 'sequence', 'timestamp'];
const RESULT_FIELDS = [
  'index',
  'item_id',
  'execution_id',
  'status',
  'response',
  'usage',
  'duration_ms',
  'self',
];

/** @param {Verification} verification */
export async function checkBatches(verification) {
  await checkRefusals(verification);
  const batch = await checkMergedStream(verification);
  if (batch) await checkResume(verification, batch);
  if (batch) await checkRepeated(verification, batch);
  if (batch) await checkResults(verification, batch);
  await checkFailedItem(verification);
  await checkCancel(verification);
}

/** @param {Verification} verification */
async function checkRefusals({ check, post, client, name, started }) {
  /** @type {[items: object[], code: string, pointers: string[]][]} */
  const cases = [
    [[], 'validation_failed', ['/items']],
    [
      [{ query: 'a' }, { query: 1 }, { query: 'c', more: 1 }],
      'validation_failed',
      ['/items/1/query', '/items/2/more'],
    ],
    [[{ query: 'a' }, { item_id: '0', query: 'b' }], 'validation_failed', ['/items/1/item_id']],
    [
      [{ query: 'a' }, { query: 'b', runtime_overrides: { more: 1 } }],
      'override_not_allowed',
      ['/items/1/runtime_overrides/more'],
    ],
  ];
  await check('a batch with a bad item is refused with its index, and none of its items runs', () =>
    started(0, async () => {
      for (const [items, code, pointers] of cases) {
        for (const way of ['', '/stream']) {
          const answer = await post(BATCH + way, { deployment_name: name, items });
          const { errors } = checkProblem(answer, 400, code);
          assert.deepEqual(new Set(errors.map(({ pointer }) => pointer)), new Set(pointers));
        }
      }
    }),
  );
  await check('an unknown batch is answered with 404', async () => {
    const path = `/api/batches/${randomUUID()}`;
    for (const part of ['', '/stream', '/results']) {
      checkProblem(await client.send('GET', path + part), 404, 'batch_not_found');
    }
    checkProblem(await post(`${path}/cancel`), 404, 'batch_not_found');
  });
}

/** @param {Verification} verification @returns {Promise<Batch | undefined>} */
async function checkMergedStream(verification) {
  const { check, stream, started, name } = verification;
  const body = { deployment_name: name, items: ITEMS, concurrency: 2 };
  const headers = { 'idempotency-key': randomUUID() };
  return check(
    'a batch streams all its items as one: each whole and in order, between the two chunks of the batch',
    async () => {
      const answer = await started(ITEMS.length, () => stream('POST', `${BATCH}/stream`, { body, headers }));
      checkStreamHeaders(answer);
      const path = answer.headers.get('content-location') ?? '';
      const batch_id = path.split('/').at(-1) ?? '';
      assert.equal(path, `/api/batches/${batch_id}`);
      assert.equal(answer.headers.get('location'), `${path}/stream`);
      const frames = readFrames(answer.bytes);
      checkIds(frames, batch_id);
      const accepted = checkOwnChunks(verification, { batch_id, frames, end: 'completed' });
      assert.deepEqual(
        accepted.map(({ item_id }) => item_id),
        ITEM_IDS,
      );
      verification.executionIds.push(...accepted.map(({ execution_id }) => execution_id));
      for (const item of accepted) await checkItem(verification, { batch_id, frames, ...item });
      return { batch_id, path, body, headers, frames };
    },
  );
}

/** Of the batch: its first chunk and its last one. @returns the items of the first one */
function checkOwnChunks({ origin }, { batch_id, frames, end }) {
  const { deployment_name, workflow_id } = origin('');
  const from = { deployment_name, workflow_id, batch_id };
  const own = frames.map(({ chunk }) => chunk).filter((chunk) => !('item_id' in chunk));
  assert.deepEqual(
    own.map(({ status, sequence }) => [status, sequence]),
    [
      ['started', 1],
      [end, 2],
    ],
  );
  assert.equal(own[0], frames[0].chunk, 'the first chunk is not that of the batch');
  assert.equal(own[1], frames.at(-1)?.chunk, 'the last chunk is not that of the batch');
  for (const chunk of own) {
    checkFields(chunk, [...OWN_FIELDS, ...Object.keys(from)]);
    checkOrigin(chunk, from);
  }
  const [{ data: first }, { data: last }] = own;
  checkFields(first, ['items']);
  checkFields(last, ['counts', 'items', 'results']);
  const names = ({ item_id, execution_id }) => ({ item_id, execution_id });
  assert.deepEqual(last.items.map(names), first.items.map(names));
  const { total, ...states } = last.counts;
  assert.equal(total, first.items.length);
  for (const [state, count] of Object.entries(states)) {
    assert.equal(last.items.filter(({ status }) => status === state).length, count, `${state}: ${count}`);
  }
  return first.items;
}

/** The chunks of one item, which are those of its own stream. */
async function checkItem({ origin, get, stream }, { batch_id, frames, item_id, execution_id }) {
  const own = frames.filter(({ chunk }) => chunk.item_id === item_id);
  own.forEach(({ chunk }) => checkChunk(chunk, { ...origin(execution_id), batch_id, item_id }));
  checkSequence(own, 'completed');
  const execution = await get(`/api/executions/${execution_id}`);
  assert.deepEqual([execution.batch_id, execution.item_id], [batch_id, item_id]);
  assert.equal(execution.response, textOf(own));
  const alone = readFrames((await stream('GET', execution.links.stream)).bytes);
  assert.deepEqual(
    own.map(({ data }) => data),
    alone.map(({ data }) => data),
  );
}

/** @param {Verification} verification @param {Batch} batch */
async function checkResume({ check, stream, client, started }, { batch_id, path, body, frames }) {
  const last = frames.length;
  const whole = frames.map(({ id, data }) => ({ id, data }));
  const after = (position) => ({ 'last-event-id': `${batch_id}:${position}` });
  const follow = (headers, query = '') => stream('GET', `${path}/stream${query}`, { headers });
  const repeat = (position, more) =>
    stream('POST', `${BATCH}/stream`, { body: { ...body, ...more }, headers: after(position) });
  await check("a batch's stream goes on after any event, with the same bytes, and runs nothing", () =>
    started(0, async () => {
      for (const position of [1, 2, Math.floor(last / 2), last - 1]) {
        const rest = whole.slice(position);
        assert.deepEqual(readEventsOf(await follow(after(position))), rest);
        assert.deepEqual(readEventsOf(await follow({}, `?after=${position}`)), rest);
        assert.deepEqual(readEventsOf(await repeat(position)), rest);
      }
      assert.deepEqual(readEventsOf(await follow({})), whole, 'the replay from the beginning differs');
    }),
  );
  await check(
    "after a batch's last event there is nothing more: 204; a cursor that is none of it is refused",
    () =>
      started(0, async () => {
        assert.equal((await follow(after(last))).status, 204);
        assert.equal((await repeat(last)).status, 204);
        for (const id of [`${batch_id}:${last + 1}`, `${randomUUID()}:1`, 'nonsense']) {
          const answer = await client.send('GET', `${path}/stream`, { headers: { 'last-event-id': id } });
          checkProblem(answer, 400, 'invalid_cursor');
        }
        checkProblem(await repeat(1, { concurrency: 3 }), 400, 'invalid_cursor');
      }),
  );
}

/** @param {Verification} verification @param {Batch} batch */
async function checkRepeated({ check, stream, client, started }, { batch_id, body, headers, frames }) {
  await check('a batch that is sent again with its key is the same batch, and runs nothing', () =>
    started(0, async () => {
      const [streamed, accepted] = await Promise.all([
        stream('POST', `${BATCH}/stream`, { body, headers }),
        client.send('POST', BATCH, { body, headers }),
      ]);
      assert.deepEqual(
        readEventsOf(streamed),
        frames.map(({ id, data }) => ({ id, data })),
      );
      assert.equal(accepted.status, 202);
      checkFields(accepted.body, ['batch_id', 'executions', 'links']);
      assert.equal(accepted.body.batch_id, batch_id);
      assert.deepEqual(accepted.body.executions, frames[0].chunk.data.items);
      const other = { ...body, items: ITEMS.slice(1) };
      for (const way of ['', '/stream']) {
        const answer = await client.send('POST', BATCH + way, { body: other, headers });
        checkProblem(answer, 422, 'idempotency_key_reused');
      }
    }),
  );
}

/** @param {Verification} verification @param {Batch} batch */
async function checkResults({ check, get, client }, { batch_id, path, frames }) {
  await check('the results of a batch are in the order of its items, and so are its pages', async () => {
    const { status, headers, body } = await client.send('GET', `${path}/results`);
    assert.equal(status, 200);
    assert.match(headers.get('content-type') ?? '', /^application\/x-ndjson/);
    assert.ok(body.endsWith('\n'), 'the last line has no end');
    const results = body
      .slice(0, -1)
      .split('\n')
      .map((line) => JSON.parse(line));
    results.forEach((result, index) => {
      checkFields(result, RESULT_FIELDS);
      const own = frames.filter(({ chunk }) => chunk.item_id === ITEM_IDS[index]);
      const { item_id, execution_id } = own[0].chunk;
      const expected = { index, item_id, execution_id, status: 'completed', response: textOf(own) };
      for (const [field, value] of Object.entries(expected)) assert.equal(result[field], value);
    });
    assert.equal(results.length, ITEMS.length);
    const pages = [];
    for (let cursor = ''; cursor !== undefined;) {
      const page = await get(`${path}?limit=2${cursor}`);
      assert.deepEqual([page.batch_id, page.status, page.progress], [batch_id, 'completed', 1]);
      pages.push(...page.items);
      cursor = page.next_cursor && `&cursor=${page.next_cursor}`;
    }
    assert.deepEqual(pages, results);
  });
}

/** @param {Verification} verification */
async function checkFailedItem(verification) {
  const { check, client, stream, get } = verification;
  await check(
    'after an item that failed, `stop` begins no other one, and the batch comes to its end',
    async () => {
      const items = [{ query: 'one' }, { query: 'two', ...FAILING }, { query: 'three' }];
      const { path, batch_id } = await accept(verification, { items, concurrency: 1, on_item_error: 'stop' });
      const frames = readFrames((await stream('GET', `${path}/stream`)).bytes);
      checkOwnChunks(verification, { batch_id, frames, end: 'completed' });
      const ends = (await get(path)).items.map(({ status }) => status);
      assert.deepEqual(ends, ['completed', 'error', 'cancelled']);
      checkProblem(await client.send('POST', `${path}/cancel`), 409, 'batch_finished');
    },
  );
}

/**
 * The built-in model answers at once, so some items may have ended before.
 * @param {Verification} verification
 */
async function checkCancel(verification) {
  const { check, client, stream, get } = verification;
  await check('a cancelled batch ends with all of its items, and none is lost', async () => {
    const items = Array.from({ length: MANY }, () => ({ query: 'hello' }));
    const { path, batch_id } = await accept(verification, { items, concurrency: 1 });
    for (let time = 1; time <= 2; time++) {
      assert.equal((await client.send('POST', `${path}/cancel`)).status, 202, `cancelled ${time} times`);
    }
    const frames = readFrames((await stream('GET', `${path}/stream`)).bytes);
    checkIds(frames, batch_id);
    checkOwnChunks(verification, { batch_id, frames, end: 'cancelled' });
    const { status, counts } = await get(path);
    assert.equal(status, 'cancelled');
    assert.equal(counts.completed + counts.cancelled, MANY);
    assert.ok(counts.cancelled > 0, 'all items completed');
    for (const { item_id, status: end } of frames.at(-1)?.chunk.data.items ?? []) {
      checkSequence(
        frames.filter(({ chunk }) => chunk.item_id === item_id),
        end,
      );
    }
  });
}

async function accept({ client, name, executionIds }, request) {
  const { status, body } = await client.send('POST', BATCH, { body: { deployment_name: name, ...request } });
  assert.equal(status, 202, JSON.stringify(body));
  executionIds.push(...body.executions.map(({ execution_id }) => execution_id));
  return { path: body.links.self, batch_id: body.batch_id };
}

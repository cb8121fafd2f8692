import { beforeAll, describe, expect, it } from '@jest/globals';
import type { BatchAcceptedDto, BatchDto } from '../../src/batches/batches.dto.js';
import { BatchRoutes, EXECUTE_BATCH, STREAM_BATCH, byItem, faultsOfMerged } from '../support/batches.js';
import type { Problem } from '../support/batches.js';
import { saying } from '../support/deployments.js';
import { rounds } from '../support/effort.js';
import { Studio, textOf, until } from '../support/studio.js';
import { withStudio } from '../support/with-studio.js';

const UNKNOWN = '01900000-0000-7000-8000-00000000ffff';
/** How many items the largest batch here has. */
const MANY = rounds(1000, 200);
const server = withStudio();
let batches: BatchRoutes;
let deployment: string;

beforeAll(async () => {
  batches = new BatchRoutes(new Studio(server.url));
  deployment = await batches.studio.deploy(saying('You said {{ query }}.'));
});

const numbered = (count: number) => Array.from({ length: count }, (_, index) => ({ query: `q${index}` }));
const request = (items: unknown, fields: object = {}) => ({ deployment_name: deployment, items, ...fields });

const untilEnded = (batchId: string) =>
  until(async () => {
    const batch = await batches.get(batchId);
    return batch.status === 'running' ? undefined : batch;
  });

async function countOf(table: 'batch' | 'execution' | 'execution_chunk'): Promise<number> {
  return (await server.database.query(`SELECT 1 FROM ${table}`)).length;
}

const state = async () => [
  await countOf('batch'),
  await countOf('execution'),
  await countOf('execution_chunk'),
];

describe('a batch', () => {
  it('is answered with its ids and links in the order of its items, and runs each of them once', async () => {
    const items = [{ item_id: 'first', query: 'a' }, { query: 'b' }, { item_id: 'last', query: 'c' }];
    const answer = await batches.ask<BatchAcceptedDto>(request(items));
    expect(answer.status).toBe(202);
    const { batch_id, executions, links } = answer.body;
    const self = `/api/batches/${batch_id}`;
    expect(executions.map(({ item_id }) => item_id)).toEqual(['first', '1', 'last']);
    expect(links).toEqual({
      self,
      stream: `${self}/stream`,
      results: `${self}/results`,
      cancel: `${self}/cancel`,
    });
    expect(['content-location', 'location'].map((name) => answer.headers.get(name))).toEqual([self, self]);

    const batch = await untilEnded(batch_id);
    expect(batch).toMatchObject({
      batch_id,
      status: 'completed',
      deployment_name: deployment,
      environment: 'production',
      progress: 1,
      concurrency: 50,
      on_item_error: 'continue',
      counts: { total: 3, queued: 0, running: 0, completed: 3, error: 0, cancelled: 0 },
      created_at: expect.any(String),
      finished_at: expect.any(String),
    });
    expect(batch).not.toHaveProperty('next_cursor');
    expect(
      batch.items.map(({ index, item_id, response, status }) => [index, item_id, response, status]),
    ).toEqual([
      [0, 'first', 'You said a.', 'completed'],
      [1, '1', 'You said b.', 'completed'],
      [2, 'last', 'You said c.', 'completed'],
    ]);
    expect(batch.items.map(({ execution_id }) => execution_id)).toEqual(
      executions.map(({ execution_id }) => execution_id),
    );
    for (const { self: path, execution_id, response } of batch.items) {
      expect((await batches.studio.json(path)).body).toMatchObject({ execution_id, response });
    }
    expect(await batches.results(batch_id)).toEqual(batch.items);
  });

  it('that is streamed is whole, and the same when it is replayed', async () => {
    const stream = await batches.stream(request(numbered(20)));
    const batchId = stream.executionId;
    expect([stream.status, stream.headers.get('location')]).toEqual([200, `/api/batches/${batchId}/stream`]);
    const frames = await stream.frames();
    expect(faultsOfMerged(frames, batchId)).toEqual([]);
    const texts = [...byItem(frames)].map(([item, chunks]) => [item, textOf(chunks)]);
    expect(new Map(texts as [string, string][])).toEqual(
      new Map(numbered(20).map(({ query }, index) => [String(index), `You said ${query}.`])),
    );
    expect(frames.at(-1)?.chunk.data).toMatchObject({
      counts: { total: 20, completed: 20, error: 0, cancelled: 0, queued: 0, running: 0 },
      results: `/api/batches/${batchId}/results`,
    });
    expect((await batches.whole(batchId)).map(({ data }) => data)).toEqual(frames.map(({ data }) => data));
    expect((await batches.follow(batchId, frames.length)).status).toBe(204);
    expect((await batches.follow(batchId, frames.length + 1)).status).toBe(400);
    const after = await fetch(
      `${server.url}/api/batches/${batchId.toUpperCase()}/stream?after=${frames.length}`,
    );
    expect(after.status).toBe(204);
  });

  it(`of ${MANY} items is taken, read in pages without a gap, and its results come in order`, async () => {
    const { batch_id, executions } = await batches.accept(request(numbered(MANY), { concurrency: 200 }));
    expect(executions).toHaveLength(MANY);
    const pages: BatchDto['items'][] = [];
    for (let query: string | undefined = `?limit=${MANY * 0.3}`; query !== undefined;) {
      const { items, next_cursor } = await batches.get(batch_id, query);
      pages.push(items);
      query = next_cursor === undefined ? undefined : `?limit=${MANY * 0.3}&cursor=${next_cursor}`;
    }
    expect(pages.map(({ length }) => length)).toEqual([0.3, 0.3, 0.3, 0.1].map((part) => part * MANY));
    expect(pages.flat().map(({ execution_id }) => execution_id)).toEqual(
      executions.map(({ execution_id }) => execution_id),
    );
    const defaults = await batches.get(batch_id, '');
    expect([defaults.items.length, defaults.next_cursor]).toEqual([100, '100']);
    expect((await batches.get(batch_id, `?cursor=${MANY}`)).items).toEqual([]);
    expect(await untilEnded(batch_id)).toMatchObject({ status: 'completed', counts: { completed: MANY } });
    const results = await batches.results(batch_id);
    expect(results.map(({ index, response }) => `${index} ${response}`)).toEqual(
      numbered(MANY).map(({ query }, index) => `${index} You said ${query}.`),
    );
    expect(faultsOfMerged(await batches.whole(batch_id), batch_id)).toEqual([]);
  });

  it.each([
    'quotes "\' and \\ and {},',
    'line\u2028break\u2029s\u0085 and\nothers\r',
    'emoji 👩‍👩‍👧‍👦 \u{10ffff}',
    '\n\nevent: x\ndata: {"status":"completed"}\n\n',
    ' ',
    '__proto__',
    'NULL',
    '\u001e',
    'x'.repeat(200),
  ])('takes any text for the name of an item and gives it back as it was: %j', async (item_id) => {
    const stream = await batches.stream(request([{ item_id, query: item_id }]));
    const frames = await stream.frames();
    expect(faultsOfMerged(frames, stream.executionId)).toEqual([]);
    expect([...byItem(frames).keys()]).toEqual([item_id]);
    expect(textOf(frames)).toBe(`You said ${item_id}.`);
    // Many programming languages cut lines at these, too.
    expect(stream.raw).not.toMatch(/[\u0085\u2028\u2029]/);
    const answer = await (await fetch(`${server.url}/api/batches/${stream.executionId}/results`)).text();
    expect(answer.trimEnd().split(/[\r\n\u0085\u2028\u2029]/)).toHaveLength(1);
    expect(JSON.parse(answer)).toMatchObject({ item_id, response: `You said ${item_id}.` });
  });

  it('can be asked for with HEAD, which keeps nothing open and reads nothing', async () => {
    const { batch_id } = await batches.accept(request(numbered(3)));
    await untilEnded(batch_id);
    for (const path of ['', '/stream', '/results']) {
      const head = await fetch(`${server.url}/api/batches/${batch_id}${path}`, { method: 'HEAD' });
      expect([path, head.status, await head.text()]).toEqual([path, 200, '']);
    }
    const { status } = await fetch(`${server.url}/api/batches/${UNKNOWN}/stream`, { method: 'HEAD' });
    expect(status).toBe(404);
    await until(async () => (await batches.studio.metric('agent_studio_open_streams')) === 0 || undefined);
  });
});

describe('an unknown batch', () => {
  it.each([UNKNOWN, 'x', '__proto__', '%00'])('is a 404 wherever it is asked for: %s', async (id) => {
    for (const path of ['', '/stream', '/results', '/cancel']) {
      const method = path === '/cancel' ? 'POST' : 'GET';
      const { status, body } = await batches.studio.json<Problem>(`/api/batches/${id}${path}`, { method });
      expect([path, status, body.code]).toEqual([path, 404, 'batch_not_found']);
    }
  });

  it('can not be gone on with', async () => {
    const headers = { 'Last-Event-ID': `${UNKNOWN}:1` };
    expect(await batches.ask(request(numbered(1)), headers, STREAM_BATCH)).toMatchObject({
      status: 404,
      body: { code: 'batch_not_found' },
    });
  });
});

/** What is refused, and where the fault is said to be. */
const refused: [string, unknown, string[]][] = [
  ['no items', [], ['/items']],
  ['more than a thousand items', numbered(1001), ['/items']],
  ['items that are no list', {}, ['/items']],
  ['a text for the items', 'items', ['/items']],
  ['null for the items', null, ['/items']],
  ['nothing for the items', undefined, ['/items']],
  [
    'texts, numbers and null',
    [{ query: 'a' }, 'x', 1, null, true],
    ['/items', '/items/1', '/items/2', '/items/3', '/items/4'],
  ],
  ['a list as an item', [{ query: 'a' }, [{ query: 'x' }]], ['/items', '/items/1']],
  ['an empty list as an item', [{ query: 'a' }, []], ['/items', '/items/1']],
  ['an item without a query', [{ query: 'a' }, { item_id: 'x' }], ['/items/1/query']],
  [
    'several bad items at once',
    [
      { query: 1 },
      { query: 'a' },
      { query: 'b', item_id: '' },
      { query: 'c', chat_history: [{ actor: 'x', content: 'y' }] },
    ],
    ['/items/0/query', '/items/2/item_id', '/items/3/chat_history/0/actor'],
  ],
  [
    'names of items that are no text',
    [
      { query: 'a', item_id: 1 },
      { query: 'b', item_id: {} },
    ],
    ['/items/0/item_id', '/items/1/item_id'],
  ],
  ['names of items that are too long', [{ query: 'a', item_id: 'x'.repeat(201) }], ['/items/0/item_id']],
  [
    'names that can not be stored',
    [
      { query: 'a', item_id: '\ud800' },
      { query: 'b', item_id: '\0' },
    ],
    ['/items/0/item_id', '/items/1/item_id'],
  ],
  [
    'the same name twice',
    [{ query: 'a', item_id: 'x' }, { query: 'b' }, { query: 'c', item_id: 'x' }],
    ['/items/2/item_id'],
  ],
  [
    'a name that another item has by its index',
    [{ query: 'a', item_id: '1' }, { query: 'b' }],
    ['/items/1/item_id'],
  ],
  [
    'fields of an execution that a batch has not',
    [
      { query: 'a', deployment_name: 'x' },
      { query: 'b', on_disconnect: 'cancel' },
    ],
    ['/items/0/deployment_name', '/items/1/on_disconnect'],
  ],
  [
    'bad overrides in several items at once',
    [
      { query: 'a', runtime_overrides: { api_key: 'x' } },
      { query: 'b', runtime_overrides: { temperature: 1 } },
      { query: 'c', runtime_overrides: { temperature: 'hot' } },
      { query: 'd', runtime_overrides: { agents: { nobody: { top_p: 1 } } } },
    ],
    [
      '/items/0/runtime_overrides/api_key',
      '/items/2/runtime_overrides/temperature',
      '/items/3/runtime_overrides/agents/nobody',
    ],
  ],
];

describe('is refused as a whole, with every fault at its place, and nothing runs', () => {
  it.each(refused)('%s', async (_name, items, pointers) => {
    const before = await state();
    for (const path of [EXECUTE_BATCH, STREAM_BATCH]) {
      const { status, body } = await batches.ask(request(items), {}, path);
      expect([status, [...new Set(body.errors?.map(({ pointer }) => pointer))].toSorted()]).toEqual([
        400,
        pointers,
      ]);
    }
    expect(await state()).toEqual(before);
  });

  it.each([
    ['concurrency', [0, 1001, 1.5, '5', null]],
    ['on_item_error', ['ignore', 1]],
    ['include', [['everything'], 'progress']],
    ['environment', [1]],
    ['on_disconnect', ['cancel']],
    ['query', ['x']],
  ])('%s', async (field, values) => {
    const before = await state();
    for (const value of values.filter((value) => value !== null)) {
      const { status, body } = await batches.ask(request(numbered(1), { [field]: value }));
      expect([value, status, body.errors?.[0]?.pointer.split('/')[1]]).toEqual([value, 400, field]);
    }
    expect(await state()).toEqual(before);
  });

  it.each(['__proto__', 'constructor', 'prototype'])('%s at any depth', async (key) => {
    const before = await state();
    const name = JSON.stringify(deployment);
    for (const item of [
      `{"query": "a", "${key}": {"polluted": 1}}`,
      `{"query": "a", "runtime_overrides": {"${key}": {"polluted": 1}}}`,
      `{"query": "a", "runtime_overrides": {"variables": {"a": [{"${key}": {"polluted": 1}}]}}}`,
      `{"query": "a", "chat_history": [{"actor": "user", "content": "x", "${key}": {}}]}`,
    ]) {
      const { status } = await batches.ask(
        `{"deployment_name": ${name}, "items": [{"query": "ok"}, ${item}]}`,
      );
      expect([item, status]).toEqual([item, 400]);
    }
    expect(({} as { polluted?: number }).polluted).toBeUndefined();
    expect(await state()).toEqual(before);
  });

  it('a deployment that is not there, or was stopped', async () => {
    const stopped = await batches.studio.deploy(saying('x'));
    await batches.studio.json(`/api/workflows/deployments/${stopped}/stop`, { method: 'POST' });
    const before = await state();
    for (const deployment_name of ['nowhere', stopped]) {
      const { status, body } = await batches.ask(request(numbered(2), { deployment_name }));
      expect([status, body.code]).toEqual([404, 'deployment_not_found']);
    }
    expect(await state()).toEqual(before);
  });
});

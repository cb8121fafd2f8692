import { afterAll, expect, it } from '@jest/globals';
import type { BatchData, Chunk } from '../../src/event-log/chunk.js';
import type { StatusSnapshot } from '../../src/status-events/status-event.js';
import { rounds } from '../support/effort.js';
import { echo } from '../support/studio.js';
import { withStudio } from '../support/with-studio.js';

/** What many line readers, such as Go's `bufio.Scanner`, take at most; a longer line ends them. */
const SCANNER_BYTES = 64 * 1024;
const PROMISED_BYTES = 48 * 1024;
/** Whose ids together are longer than a line. */
const ITEMS = rounds(1000, 400);

/** It accepts and runs nothing, until another process does. */
const system = withStudio({ env: { ROLE: 'api' } });
const { studio } = system;
const left = new AbortController();
afterAll(() => left.abort());

/** Reads an event stream as a line scanner does; throws where that would, and at a line that is longer than promised. */
async function* scan(response: Response): AsyncGenerator<string> {
  let rest = Buffer.alloc(0);
  for await (const bytes of response.body ?? []) {
    rest = Buffer.concat([rest, bytes]);
    for (let end = rest.indexOf(10); end >= 0; end = rest.indexOf(10)) {
      if (end > PROMISED_BYTES) throw new Error(`A line is longer than promised: ${end} bytes.`);
      yield rest.subarray(0, end).toString();
      rest = rest.subarray(end + 1);
    }
    if (rest.length > SCANNER_BYTES) throw new Error('bufio.Scanner: token too long');
  }
}

const open = (path: string, body?: object) =>
  fetch(studio.url + path, {
    ...(body && { method: 'POST', body: JSON.stringify(body) }),
    headers: { 'Content-Type': 'application/json' },
    signal: left.signal,
  });

/** All `data:` lines of a stream to its end. */
async function read<Data>(response: Response): Promise<Data[]> {
  const data: Data[] = [];
  for await (const line of scan(response)) {
    if (line.startsWith('data: ')) data.push(JSON.parse(line.slice(6)) as Data);
  }
  return data;
}

/** The first event of a stream that has no end. */
async function first<Data>(response: Response): Promise<Data> {
  for await (const line of scan(response)) {
    if (line.startsWith('data: ')) return JSON.parse(line.slice(6)) as Data;
  }
  throw new Error('The stream ended without an event.');
}

it('no line of a batch with very many long ids, of its executions or of the status passes 48 KiB', async () => {
  const deployment_name = await studio.deploy(echo());
  const items = Array.from({ length: ITEMS }, (_, index) => ({
    item_id: `${index}-`.padEnd(150, 'i'),
    query: index === 0 ? '😀"\u2028é'.repeat(8000) : 'short',
  }));
  const batch = await open('/api/workflows/execute/batch/stream', {
    deployment_name,
    items,
    concurrency: 200,
  });
  const snapshot = await first<StatusSnapshot>(await open('/api/executions/events'));
  expect(snapshot).toMatchObject({ items_omitted: true, queued: ITEMS });
  const ofDeployment = await first<StatusSnapshot>(await open(`/api/deployments/${deployment_name}/events`));
  expect(ofDeployment).toMatchObject({ items_omitted: true, deployments: [{ deployment_name }] });
  for (const { executions } of [snapshot, ofDeployment]) {
    expect(executions.length).toBeGreaterThan(50);
    const newest = executions.map(({ execution_id }) => execution_id);
    expect(newest).toEqual(newest.toSorted().toReversed());
  }
  await system.startAnother({ ROLE: 'worker' });
  const chunks = await read<Chunk>(batch);
  const own = chunks.filter(({ item_id }) => item_id === undefined);
  expect(own.map(({ status, data }) => [status, data as BatchData])).toEqual([
    ['started', { items_omitted: true }],
    [
      'completed',
      {
        counts: expect.objectContaining({ total: ITEMS, completed: ITEMS }),
        results: expect.any(String),
        items_omitted: true,
      },
    ],
  ]);
  expect(new Set(chunks.flatMap(({ item_id }) => item_id ?? [])).size).toBe(ITEMS);
  const long = chunks.find(({ item_id }) => item_id === items[0]?.item_id)?.execution_id;
  const followed = await read<Chunk>(await open(`/api/executions/${long}/stream`));
  const said = followed.filter(({ type }) => type === 'content').map(({ data }) => data);
  expect(said.length).toBeGreaterThan(3);
  expect(said.join('')).toContain(items[0]?.query);
});

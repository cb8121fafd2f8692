import { beforeAll, describe, expect, it } from '@jest/globals';
import fc from 'fast-check';
import { v7 as uuidv7 } from 'uuid';
import type { Chunk } from '../../src/event-log/chunk.js';
import { EventLog, FencedError } from '../../src/event-log/event-log.js';
import type { LogOwner } from '../../src/event-log/event-log.js';
import { StepStore } from '../../src/executions/step-store.js';
import { itInFull, rounds } from '../support/effort.js';
import { withStudio } from '../support/with-studio.js';

const server = withStudio({ env: { ROLE: 'api' }, others: { other: {} } });
let log: EventLog;
let otherLog: EventLog;

beforeAll(() => {
  log = server.app.get(EventLog);
  otherLog = server.others.other.app.get(EventLog);
});

const END = { status: 'completed', response: '', input_tokens: 1, output_tokens: 2 } as const;

/** A running execution whose log is empty. */
async function begin(): Promise<LogOwner> {
  const owner = {
    execution_id: uuidv7(),
    deployment_name: 'd',
    workflow_id: uuidv7(),
    fence: 1,
    last_sequence: 0,
  };
  await server.database.query(
    `INSERT INTO execution (execution_id, deployment_id, deployment_name, environment, workflow_id, revision_id, status, fence, input, created_at)
     VALUES ($1, $2, 'd', 'production', $3, $2, 'running', 1, '{}', now())`,
    [owner.execution_id, uuidv7(), owner.workflow_id],
  );
  return owner;
}

async function takeOver(owner: LogOwner): Promise<LogOwner> {
  await server.database.query('UPDATE execution SET fence = fence + 1 WHERE execution_id = $1', [
    owner.execution_id,
  ]);
  const [row] = await server.database.query<{ last: number | null }>(
    'SELECT max(last_sequence) AS last FROM execution_chunk WHERE execution_id = $1',
    [owner.execution_id],
  );
  return { ...owner, fence: owner.fence + 1, last_sequence: row?.last ?? 0 };
}

async function readAll(from: EventLog, executionId: string, after = 0): Promise<Chunk[]> {
  const chunks: Chunk[] = [];
  const signal = AbortSignal.timeout(60_000);
  for await (const batch of from.read(executionId, after, { signal })) {
    chunks.push(...batch.chunks.map((line) => JSON.parse(line) as Chunk));
  }
  return chunks;
}

async function readSome(from: EventLog, executionId: string, count: number): Promise<Chunk[]> {
  const chunks: Chunk[] = [];
  for await (const batch of from.read(executionId, 0, { signal: AbortSignal.timeout(60_000) })) {
    chunks.push(...batch.chunks.map((line) => JSON.parse(line) as Chunk));
    if (chunks.length >= count) break;
  }
  return chunks;
}

const content = (data: string) => ({ type: 'content', data, agent_id: 'a' }) as const;
const sequences = (chunks: Chunk[]) => chunks.map(({ sequence }) => sequence);
const upTo = (last: number, first = 1) =>
  Array.from({ length: last - first + 1 }, (_, index) => first + index);

describe('a writer that failed for good', () => {
  it('says why, and writes nothing more', async () => {
    const owner = await begin();
    const writer = log.open(owner);
    // PostgreSQL's text can't hold what JSON.stringify escapes, so only a wrong owner makes the statement itself fail.
    const broken = log.open({ ...owner, execution_id: 'not-a-uuid' });
    broken.append(content('x'));
    await expect(broken.flush()).rejects.toMatchObject({ code: '22P02' });
    await expect(broken.finish(END)).rejects.not.toThrow(FencedError);
    writer.append(content('fine'));
    await writer.flush();
    expect(sequences(await readSome(log, owner.execution_id, 1))).toEqual([1]);
  });
});

describe('an older attempt', () => {
  it('that goes on writing changes nothing, and is told so', async () => {
    const owner = await begin();
    const zombie = log.open(owner);
    zombie.append(content('one'));
    await zombie.flush();
    const newer = otherLog.open(await takeOver(owner));
    zombie.append(content('of the zombie'));
    await expect(zombie.flush()).rejects.toThrow(FencedError);
    expect(zombie.fenced.aborted).toBe(true);
    newer.append(content('two'));
    await newer.finish(END);
    await expect(zombie.finish({ ...END, response: 'of the zombie' })).rejects.toThrow(FencedError);
    const chunks = await readAll(log, owner.execution_id);
    expect(chunks.map(({ data, status }) => data ?? status)).toEqual(['one', 'two', 'completed']);
  });

  it('in the same process as the newer one is not taken for it', async () => {
    const owner = await begin();
    const zombie = log.open(owner);
    const readers = [readSome(log, owner.execution_id, 1), readSome(otherLog, owner.execution_id, 1)];
    const newer = log.open(await takeOver(owner));
    zombie.append(content('void'));
    newer.append(content('new'));
    await Promise.allSettled([zombie.flush(), newer.flush()]);
    expect(zombie.fenced.aborted).toBe(true);
    for (const chunks of await Promise.all(readers)) expect(chunks.map(({ data }) => data)).toEqual(['new']);
  });

  it('that ends at the same moment as the newer one leaves one end', async () => {
    for (let round = 0; round < rounds(20, 6); round++) {
      const owner = await begin();
      const zombie = log.open(owner);
      zombie.append(content('x'));
      const [, taken] = await Promise.all([zombie.flush().catch(() => undefined), takeOver(owner)]);
      const newer = otherLog.open(await takeOver(taken));
      const ends = await Promise.allSettled([
        zombie.finish(END),
        newer.finish({ ...END, status: 'cancelled' }),
      ]);
      expect(ends.map(({ status }) => status)).toEqual(['rejected', 'fulfilled']);
      const chunks = await readAll(log, owner.execution_id);
      expect(sequences(chunks)).toEqual(upTo(chunks.length));
      expect(chunks.filter(({ status }) => status !== undefined)).toHaveLength(1);
    }
  });
});

describe('a crash of PostgreSQL that took the last chunks away', () => {
  async function crashed() {
    const owner = await begin();
    const writer = log.open(owner);
    writer.append(content('kept'));
    await writer.flush();
    writer.append(content('lost'));
    const logged = await writer.flush();
    await server.database.query(
      'DELETE FROM execution_chunk WHERE execution_id = $1 AND first_sequence = $2',
      [owner.execution_id, logged],
    );
    return { owner, writer, logged };
  }

  it('leaves no gap: the writer that goes on beyond them is shut out, in the middle and at its end', async () => {
    const { owner, writer } = await crashed();
    writer.append(content('more'));
    await expect(writer.flush()).rejects.toThrow(FencedError);
    const another = await crashed();
    await expect(another.writer.finish(END)).rejects.toThrow(FencedError);
    for (const { execution_id } of [owner, another.owner]) {
      const chunks = await readSome(log, execution_id, 1);
      expect(chunks.map(({ data }) => data)).toEqual(['kept']);
    }
  });

  it('leaves no checkpoint of a step that said them', async () => {
    const { owner, logged } = await crashed();
    const step = {
      step_id: uuidv7(),
      execution_id: owner.execution_id,
      agent_id: 'a',
      status: 'completed',
      attempt: 1,
      output: 'kept lost',
      error: null,
      code: null,
      input_tokens: 0,
      output_tokens: 0,
      started_at: new Date(),
      finished_at: new Date(),
    } as const;
    const steps = server.app.get(StepStore);
    const saved = () =>
      server.database.query('SELECT 1 FROM step WHERE execution_id = $1', [owner.execution_id]);
    await steps.save(step, { fence: owner.fence, logged });
    expect(await saved()).toHaveLength(0);
    await steps.save(step, { fence: owner.fence, logged: logged - 1 });
    expect(await saved()).toHaveLength(1);
  });
});

describe('ends that are written in one statement', () => {
  it('of several writers of one attempt leave one end, and harm no neighbour', async () => {
    for (let round = 0; round < rounds(20, 6); round++) {
      const [owner, neighbour] = [await begin(), await begin()];
      const ends = await Promise.allSettled([
        ...Array.from({ length: 5 }, () => log.open(owner).finish({ ...END, status: 'cancelled' })),
        log.open(neighbour).finish(END),
      ]);
      expect(ends.pop()).toEqual({ status: 'fulfilled', value: 'completed' });
      expect(ends.filter(({ status }) => status === 'fulfilled')).toHaveLength(1);
      for (const end of ends) {
        if (end.status === 'rejected') expect(end.reason).toBeInstanceOf(FencedError);
      }
      const chunks = await readAll(log, owner.execution_id);
      expect(chunks.map(({ status }) => status)).toEqual(['cancelled']);
      await expect(log.open(owner).finish({ ...END, status: 'cancelled' })).rejects.toThrow(FencedError);
    }
  });

  it('of an older attempt and of the newer one leave that of the newer one', async () => {
    for (let round = 0; round < rounds(20, 6); round++) {
      const owner = await begin();
      const newer = await takeOver(owner);
      const ends = await Promise.allSettled([
        log.open({ ...owner, last_sequence: newer.last_sequence }).finish(END),
        log.open(newer).finish({ ...END, status: 'cancelled' }),
      ]);
      expect(ends.map(({ status }) => status)).toEqual(['rejected', 'fulfilled']);
      const chunks = await readAll(log, owner.execution_id);
      expect(chunks.map(({ status }) => status)).toEqual(['cancelled']);
    }
  });
});

it('a reader in another process gets every chunk once and in order', async () => {
  const owner = await begin();
  const writer = log.open(owner);
  const reading = [readAll(log, owner.execution_id), readAll(otherLog, owner.execution_id)];
  for (let round = 0; round < 50; round++) {
    for (let chunk = 0; chunk < 10; chunk++) writer.append(content(`${round}.${chunk}`));
    await writer.flush();
  }
  await writer.finish(END);
  for (const chunks of await Promise.all(reading)) expect(sequences(chunks)).toEqual(upTo(501));
});

it('a reader that does not read holds nobody up and misses nothing', async () => {
  const owner = await begin();
  const writer = log.open(owner);
  const slow = log.read(owner.execution_id, 0, { signal: AbortSignal.timeout(60_000) });
  writer.append(content('first'));
  const head = await slow.next();
  const text = 'x'.repeat(1000);
  for (let chunk = 0; chunk < 3000; chunk++) {
    writer.append(content(text));
    await writer.drain();
  }
  await writer.finish(END);
  let last = head.value?.last ?? 0;
  let largest = 0;
  for await (const batch of slow) {
    expect(batch.first).toBe(last + 1);
    last = batch.last;
    largest = Math.max(largest, batch.chunks.join().length);
  }
  expect(last).toBe(3002);
  expect(largest).toBeLessThan(1_000_000);
});

it('silence is reported to a reader that asks for it, and an abort ends it without an error', async () => {
  const owner = await begin();
  const abort = new AbortController();
  const reader = log.read(owner.execution_id, 0, { signal: abort.signal, idleMs: 20 });
  expect((await reader.next()).value).toMatchObject({ chunks: [] });
  const next = reader.next();
  abort.abort();
  expect((await next).done).toBe(true);
});

itInFull(
  'silence stays silence for a reader although processes tell each other their positions every two seconds',
  async () => {
    const owner = await begin();
    const writer = log.open(owner);
    const abort = new AbortController();
    const readers = [log, otherLog].map((from) =>
      from.read(owner.execution_id, 0, { signal: abort.signal, idleMs: 2500 }),
    );
    const first = readers.map((reader) => reader.next());
    writer.append(content('x'));
    for (const { value } of await Promise.all(first)) expect(value?.chunks).toHaveLength(1);
    for (const { value } of await Promise.all(readers.map((reader) => reader.next())))
      expect(value?.chunks).toEqual([]);
    abort.abort();
  },
);

it('whatever the writer does and wherever readers are cut, the parts join to the whole', async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.array(fc.record({ chunks: fc.integer({ min: 1, max: 30 }), wait: fc.boolean() }), {
        minLength: 1,
        maxLength: 12,
      }),
      fc.array(fc.integer({ min: 1, max: 40 }), { minLength: 1, maxLength: 6 }),
      async (bursts, cuts) => {
        const owner = await begin();
        const writer = log.open(owner);
        const writing = (async () => {
          for (const { chunks, wait } of bursts) {
            for (let chunk = 0; chunk < chunks; chunk++) writer.append(content(`${chunk}`));
            if (wait) await writer.flush();
          }
          await writer.finish(END);
        })();
        const readers = [log, otherLog].map(async (from) => {
          const seen: number[] = [];
          let ended = false;
          for (const cut of [...cuts, Infinity]) {
            if (ended) break;
            const goal = seen.length + cut;
            for await (const batch of from.read(owner.execution_id, seen.length, {
              signal: AbortSignal.timeout(60_000),
            })) {
              const parsed = batch.chunks.map((line) => (JSON.parse(line) as Chunk).sequence);
              seen.push(...parsed.slice(0, goal - seen.length));
              ended = batch.terminal && seen.at(-1) === batch.last;
              if (seen.length >= goal) break;
            }
          }
          return seen;
        });
        await writing;
        const total = bursts.reduce((sum, { chunks }) => sum + chunks, 0) + 1;
        for (const seen of await Promise.all(readers)) expect(seen).toEqual(upTo(total));
      },
    ),
    { numRuns: rounds(25, 8), verbose: 1 },
  );
});

import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, beforeEach, describe, expect, it } from '@jest/globals';
import { BatchRoutes, byItem, faultsOfMerged, linesOf } from '../support/batches.js';
import { Chaos, LOCK_MS, PATIENCE_MS, START_MS } from '../support/chaos.js';
import type { StackProcess } from '../support/chaos.js';
import { expectWhole } from '../support/chaos-checks.js';
import { Studio, faultsOfStream, textOf, until } from '../support/studio.js';
import type { EventStream, Frame } from '../support/studio.js';

/** So long is no lock kept. */
const PAST_THE_LOCK_MS = 2.5 * LOCK_MS;
const PIECES = 8;
/** How often the worker of an execution is killed. */
const KILLS = 4;

/** The clocks of its processes are wrong by an hour, of some ahead and of some behind: nothing is told by them. */
let chaos: Chaos;
let deployment: string;
/** Its answers say which call they came from. */
let tagged: string;

beforeAll(async () => {
  const preload = new URL('../support/wrong-clock.mjs', import.meta.url).href;
  chaos = await Chaos.start({
    workers: 3,
    env: { NODE_OPTIONS: `--import=${preload}`, MAX_LOST_ATTEMPTS: '50' },
  });
  deployment = await chaos.studio().deploy({ agents: [chaos.ledger.agent('a', PIECES, 10)] });
  tagged = await chaos.studio().deploy({ agents: [chaos.ledger.agent('tagged', PIECES, 10)] });
}, START_MS);
afterAll(() => chaos?.stop(), START_MS);
beforeEach(
  async () => void (await Promise.all(chaos.stack.workers.map((worker) => worker.start()))),
  PATIENCE_MS,
);

/** Runs executions until a call came from this process; all of them must be whole. */
async function runUntilCalledBy(worker: StackProcess): Promise<void> {
  await until(async () => {
    const marker = chaos.marker();
    chaos.ledger.hold(marker);
    const runs = [chaos.client(deployment, marker).stream()];
    const isOfWorker = (await chaos.callerOf(await chaos.ledger.call(marker))) === worker;
    chaos.ledger.letGo(marker);
    const speakers = () => [{ agent_id: 'a', pieces: PIECES }];
    await expectWhole(chaos, await Promise.all(runs), { speakers });
    return isOfWorker;
  }, PATIENCE_MS);
}

/** Text of one call of a tagged agent. */
const saidBy = (ordinal: number, frames: Frame[]) =>
  frames.filter(({ chunk }) => chunk.data?.toString().includes(`#${ordinal} `));

describe('a worker that is stopped for longer than its lock', () => {
  // Its successor's first chunk is already in its way in the first case, and nothing but its outdated claim in the second.
  it.each([
    ['in the middle of its answer', PIECES / 2],
    ['before its first word', 0],
  ])(
    '%s has its execution taken over, writes nothing more, and lives on',
    async (_moment, said) => {
      await chaos.reporting(async () => {
        const { ledger } = chaos;
        const marker = chaos.marker('zombie');
        ledger.hold(marker, said);
        const stream = chaos.client(tagged, marker).stream();
        const first = await ledger.call(marker, 1);
        const zombie = await chaos.callerOf(first);
        const { pid } = zombie;
        await until(async () => (await chaos.lastSequence(marker)) === 1 + said);
        zombie.kill('SIGSTOP');
        const second = await ledger.call(marker, 2);
        expect(await chaos.callerOf(second)).not.toBe(zombie);
        await until(async () => (await chaos.lastSequence(marker)) === (said > 0 ? 2 + 2 * said : 1));
        // Its model says the rest now, which it finds when it wakes up, and before it learns that it was overtaken.
        ledger.letGo(marker, 1);
        await first.spoken;
        zombie.kill('SIGCONT');
        expect(await first.closed).toBe(true);
        ledger.letGo(marker);
        const { frames, executionId } = await stream;
        expect(faultsOfStream(frames, executionId)).toEqual([]);
        const statuses = frames.map(({ chunk }) => chunk.status).filter(Boolean);
        expect(statuses).toEqual(['started', ...(said > 0 ? ['restarted'] : []), 'completed']);
        const after = frames.slice(frames.findIndex(({ chunk }) => chunk.status === 'restarted') + 1);
        expect(saidBy(1, after)).toEqual([]);
        expect(saidBy(2, frames)).toHaveLength(PIECES);
        const [row] = await chaos.rows([executionId]);
        expect(row).toMatchObject({
          status: 'completed',
          attempt: 2,
          response: textOf(after),
        });
        await runUntilCalledBy(zombie);
        expect(zombie.pid).toBe(pid);
      });
    },
    120_000,
  );

  it('and is the only one goes on with its own execution once, not again and again', async () => {
    await chaos.reporting(async () => {
      const { ledger, stack } = chaos;
      const [only, ...others] = stack.workers;
      await Promise.all(others.map((other) => other.stop()));
      const marker = chaos.marker('alone');
      ledger.hold(marker);
      const stream = chaos.client(tagged, marker).stream();
      await ledger.call(marker, 1);
      const pid = only?.pid;
      only?.kill('SIGSTOP');
      await sleep(PAST_THE_LOCK_MS); // the length of the stop is what this is about
      only?.kill('SIGCONT');
      // It goes on if it finds its lock still its own, and begins again if it does not.
      await sleep(PAST_THE_LOCK_MS);
      ledger.letGo(marker);
      const { frames, executionId } = await stream;
      expect(faultsOfStream(frames, executionId)).toEqual([]);
      expect(frames.at(-1)?.chunk.status).toBe('completed');
      const calls = ledger.of(marker).length;
      expect(calls).toBeLessThanOrEqual(2);
      expect(saidBy(calls, frames)).toHaveLength(PIECES);
      expect(only?.pid).toBe(pid);
    });
  }, 120_000);
});

/** How much each item of a batch has said when its worker is stopped. */
const SAID = [0, PIECES / 2, 1, 0, PIECES - 1, PIECES / 2];
const sum = (counts: number[]) => counts.reduce((total, count) => total + count, 0);

/** Reads a merged stream as it comes. */
function reading(stream: EventStream): { frames: Frame[]; whole: Promise<Frame[]> } {
  const frames: Frame[] = [];
  const read = async () => {
    for await (const frame of stream) frames.push(frame);
    return frames;
  };
  const whole = read();
  whole.catch(() => undefined); // a test that has failed meanwhile does not wait for it
  return { frames, whole };
}

/** Of an item: what its first attempt said before the second one began, and nothing after that. */
function expectTakenOver(frames: Frame[], said: number): void {
  const at = frames.findIndex(({ chunk }) => chunk.status === 'restarted');
  expect(at).toBe(said > 0 ? 1 + said : -1);
  expect(saidBy(1, frames.slice(0, at + 1))).toHaveLength(said);
  expect(saidBy(1, frames.slice(at + 1))).toEqual([]);
  expect(saidBy(2, frames.slice(at + 1))).toHaveLength(PIECES);
  expect(frames.at(-1)?.chunk.status).toBe('completed');
}

describe('a worker that is stopped for longer than its lock, with the items of a batch', () => {
  it('has them taken over, and all readers of the batch have one stream, without its last words', async () => {
    await chaos.reporting(async () => {
      const { ledger, stack } = chaos;
      const [zombie, ...others] = stack.workers;
      const [other] = others;
      const routes = [0, 1].map((index) => new BatchRoutes(chaos.studio(index)));
      const [here, there] = routes;
      if (!zombie || !other || !here || !there) throw new Error('There is no such process.');
      await Promise.all(others.map((worker) => worker.stop())); // all items are the zombie's
      const queries = SAID.map((said) => {
        const query = chaos.marker('item');
        ledger.hold(query, said);
        return query;
      });
      const items = queries.map((query, index) => ({ item_id: `item ${index}`, query }));
      const first = await here.stream({ deployment_name: tagged, items });
      const batchId = first.executionId;
      const readers = [reading(first), reading(await there.follow(batchId))];
      const haveRead = (count: number) => until(() => readers.every(({ frames }) => frames.length === count));
      const begun = 1 + sum(SAID.map((said) => 1 + said));
      await haveRead(begun);
      const calls = await Promise.all(queries.map((query) => ledger.call(query)));
      const { pid } = zombie;
      zombie.kill('SIGSTOP');
      await other.start();
      await Promise.all(queries.map((query) => ledger.call(query, 2)));
      await haveRead(begun + sum(SAID.map((said) => (said > 0 ? 1 + said : 0))));
      const left = await (await there.follow(batchId)).take(begun + 2);
      // Its models say the rest now, which it finds when it wakes up, and before it learns that it was overtaken.
      queries.forEach((query) => ledger.letGo(query, 1));
      await Promise.all(calls.map(({ spoken }) => spoken));
      zombie.kill('SIGCONT');
      expect(await Promise.all(calls.map(({ closed }) => closed))).toEqual(SAID.map(() => true));
      queries.forEach((query) => ledger.letGo(query));
      const back = reading(await here.follow(batchId, left.length));
      const [log = [], ...logs] = await Promise.all(readers.map(({ whole }) => whole));
      expect(faultsOfMerged(log, batchId)).toEqual([]);
      logs.push(
        [...left, ...(await back.whole)],
        ...(await Promise.all(routes.map((at) => at.whole(batchId)))),
      );
      for (const frames of logs) expect(linesOf(frames)).toEqual(linesOf(log));
      SAID.forEach((said, index) => expectTakenOver(byItem(log).get(`item ${index}`) ?? [], said));
      const results = await there.results(batchId);
      const rows = await chaos.rows(results.map(({ execution_id }) => execution_id));
      expect(rows.map(({ attempt, status }) => [attempt, status])).toEqual(SAID.map(() => [2, 'completed']));
      expect(zombie.pid).toBe(pid);
    });
  }, 120_000);
});

describe('an api process that is stopped for a while', () => {
  it('goes on with its streams when it wakes up, while its clients may have gone elsewhere', async () => {
    await chaos.reporting(async () => {
      const { ledger, stack } = chaos;
      const [zombie] = stack.apis;
      if (!zombie) throw new Error('There is no api process.');
      const marker = chaos.marker('api');
      ledger.hold(marker);
      const faithful = await new Studio(zombie.url).stream({ deployment_name: deployment, query: marker });
      const { executionId } = faithful;
      const waiting = faithful.frames();
      await until(async () => (await chaos.lastSequence(marker)) === 1 + PIECES / 2);
      zombie.kill('SIGSTOP');
      const elsewhere = await chaos.studio(1).follow(executionId, 2);
      ledger.letGo(marker);
      const rest = await elsewhere.frames();
      await sleep(PAST_THE_LOCK_MS); // long enough to be taken for dead
      zombie.kill('SIGCONT');
      const frames = await waiting;
      expect(faultsOfStream(frames, executionId)).toEqual([]);
      expect(rest.map(({ data }) => data)).toEqual(frames.slice(2).map(({ data }) => data));
      const again = await new Studio(zombie.url).stream({
        deployment_name: deployment,
        query: chaos.marker(),
      });
      expect(faultsOfStream(await again.frames(), again.executionId)).toEqual([]);
      expect(zombie.starts).toBe(1);
    });
  }, 120_000);
});

describe('workers that are killed', () => {
  it('have what they ran taken over, each time, and the living ones nothing', async () => {
    await chaos.reporting(async () => {
      const { ledger } = chaos;
      const marker = chaos.marker('moving');
      const still = chaos.marker('still');
      for (const held of [marker, still]) ledger.hold(held);
      const run = chaos.client(deployment, marker).stream();
      const other = chaos.client(deployment, still).stream();
      const keeper = await chaos.callerOf(await ledger.call(still, 1));
      let kills = 0;
      for (let call = 1; kills < KILLS; call++) {
        const worker = await chaos.callerOf(await ledger.call(marker, call));
        if (worker === keeper) break; // killing it would take the other one, too
        worker.kill('SIGKILL');
        kills++;
      }
      expect(ledger.of(still)).toHaveLength(1);
      for (const held of [marker, still]) ledger.letGo(held);
      const speakers = () => [{ agent_id: 'a', pieces: PIECES }];
      await expectWhole(chaos, await Promise.all([run, other]), { speakers });
      if (kills === 0) {
        keeper.kill('SIGKILL');
        await chaos.client(deployment).stream();
      }
    });
  }, 120_000);
});

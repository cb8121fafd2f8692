import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { Chaos, LOCK_MS, PATIENCE_MS, START_MS } from '../support/chaos.js';
import { expectWhole } from '../support/chaos-checks.js';
import type { ClientRun } from '../support/chaos-clients.js';
import { rounds } from '../support/effort.js';
import { expectByChance } from '../support/inconclusive.js';
import { until } from '../support/studio.js';
import { Yardstick } from '../support/yardstick.js';

/** How long the database comes and goes. */
const UNREST_MS = rounds(20_000, 10_000);
/** A request gets its answer within this time, while the database is away for 2 s at most. */
const ANSWERED_MS = 5000;
const AT_ONCE = 8;
/** How often a client that does not follow its executions asks for another one: at once, they would only pile up. */
const ACCEPT_EVERY_MS = 500;
const PIECES = 20;
/** A whole test; only ends one that hangs. */
const HANG_MS = 170_000;
const speakers = () => [{ agent_id: 'a', pieces: PIECES }];

let chaos: Chaos;
let deployment: string;

beforeAll(async () => {
  chaos = await Chaos.start();
  deployment = await chaos.studio().deploy({ agents: [chaos.ledger.agent('a', PIECES, 25)] });
}, START_MS);
afterAll(() => chaos?.stop(), START_MS);

const servers = () => [...chaos.stack.apis, ...chaos.stack.workers];

function postgres() {
  const server = chaos.stack.postgres;
  if (!server) throw new Error('The stack has no PostgreSQL of its own.');
  return server;
}

/** Readiness of every process. */
const readiness = () =>
  Promise.all(servers().map(async ({ url }) => (await fetch(`${url}/health/ready`)).status));
const allAre = async (status: number) => (await readiness()).every((ready) => ready === status);

/** When the database was not stopped in good order. */
const crashes: number[] = [];

/** Takes the database away for 0 to 2 s, in one of its ways. */
async function takeAway(): Promise<void> {
  const { random } = chaos;
  const gapMs = random.int(0, 2000);
  const way = random.pick(['fast', 'immediate', 'SIGKILL', 'SIGSTOP'] as const);
  if (way === 'SIGSTOP') {
    postgres().pause();
    await sleep(gapMs);
    postgres().resume();
  } else {
    await postgres().stop(way);
    if (way !== 'fast') crashes.push(Date.now());
    await until(() => allAre(503));
    await sleep(gapMs);
    await postgres().start();
  }
  await until(() => allAre(200));
}

/** What requests were answered with, and the longest time that one took. */
interface Answers {
  statuses: number[];
  longestMs: number;
  withoutRetryAfter: number;
}

/** Asks for an execution again and again, at any process. */
async function askWhile(isGoingOn: () => boolean, executionId: string): Promise<Answers> {
  const answers: Answers = { statuses: [], longestMs: 0, withoutRetryAfter: 0 };
  while (isGoingOn()) {
    const begun = performance.now();
    const { status, headers } = await chaos
      .studio(chaos.random.int(0, 1))
      .json(`/api/executions/${executionId}`);
    answers.longestMs = Math.max(answers.longestMs, performance.now() - begun);
    answers.statuses.push(status);
    if (status === 503 && !headers.has('retry-after')) answers.withoutRetryAfter++;
    await sleep(50);
  }
  return answers;
}

/** Half of them streamed, the others only accepted. */
async function runWhile(isGoingOn: () => boolean): Promise<ClientRun[]> {
  const runs: ClientRun[] = [];
  const one = async () => {
    while (isGoingOn()) {
      const client = chaos.client(deployment);
      const isStreamed = chaos.random.int(0, 1) === 1;
      runs.push(await (isStreamed ? client.stream() : client.accept()));
      if (!isStreamed) await sleep(ACCEPT_EVERY_MS);
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, one));
  return runs;
}

/** Starts streams whose models were called, and hold still in the middle of their answers. */
async function startHeld(count: number, name: string) {
  const { ledger } = chaos;
  const markers = Array.from({ length: count }, () => chaos.marker(name));
  markers.forEach((marker) => ledger.hold(marker));
  const streams = markers.map((marker) => chaos.client(deployment, marker).stream());
  const calls = await Promise.all(markers.map((marker) => ledger.call(marker)));
  return { markers, streams, calls };
}

describe('a database that is away for a moment, again and again', () => {
  it(
    'loses no execution and no chunk, ends no process, and is answered with 503 meanwhile',
    async () => {
      await chaos.reporting(async () => {
        const first = await chaos.client(deployment).stream();
        const yardstick = await Yardstick.lay(chaos.stack.databaseUrl);
        let isOver = false;
        const isGoingOn = () => !isOver;
        const load = Promise.all([runWhile(isGoingOn), askWhile(isGoingOn, first.executionId)]);
        load.catch(() => undefined); // awaited below, unless the unrest fails first
        const end = Date.now() + UNREST_MS;
        try {
          while (Date.now() < end) {
            await sleep(chaos.random.int(3000, 8000)); // with the gap: every 5 to 10 s
            await takeAway();
          }
        } finally {
          isOver = true;
        }
        const [runs, answers] = await load;
        await chaos.ended(runs, PATIENCE_MS);
        await expectWhole(chaos, runs, { speakers, crashes });
        expectByChance('executions meanwhile', runs.length, rounds(15, 5));
        expect(answers.statuses.filter((status) => status !== 200 && status !== 503)).toEqual([]);
        expectByChance(
          'answers while it was away',
          answers.statuses.filter((status) => status === 503).length,
          1,
        );
        expect(answers.withoutRetryAfter).toBe(0);
        await yardstick.expectAtMost(answers.longestMs, ANSWERED_MS, 'the slowest answer');
        expect(servers().map(({ starts }) => starts)).toEqual([1, 1, 1, 1]);
      }, HANG_MS);
    },
    HANG_MS + 10_000,
  );
});

describe('a database that is away for longer than the locks of workers', () => {
  it('has nobody run an execution again: they go on where they were', async () => {
    await chaos.reporting(async () => {
      const { ledger } = chaos;
      const { markers, streams, calls } = await startHeld(8, 'away');
      await until(async () => {
        const lasts = await Promise.all(markers.map((marker) => chaos.lastSequence(marker)));
        return lasts.every((last) => last === 1 + PIECES / 2);
      });
      await postgres().stop('fast');
      await until(() => allAre(503));
      await sleep(4 * LOCK_MS); // the length of the outage is what this is about
      // The models of some say the rest meanwhile.
      markers.slice(0, 4).forEach((marker) => ledger.letGo(marker));
      await Promise.all(calls.slice(0, 4).map(({ closed }) => closed));
      await sleep(4 * LOCK_MS);
      await postgres().start();
      await until(() => allAre(200));
      markers.forEach((marker) => ledger.letGo(marker));
      const runs = await Promise.all(streams);
      await expectWhole(chaos, runs, { speakers });
      expect(ledger.calls.filter(({ marker }) => markers.includes(marker))).toHaveLength(markers.length);
    });
  }, 120_000);
});

describe('connections that wait for notifications', () => {
  it('may be cut: streams at other processes go on', async () => {
    await chaos.reporting(async () => {
      const { ledger } = chaos;
      const { markers, streams } = await startHeld(6, 'cut');
      for (let round = 0; round < 3; round++) {
        await until(async () => {
          const cut = await chaos.sql(
            `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
              WHERE datname = current_database() AND pid <> pg_backend_pid()
                AND (query ILIKE 'listen%' OR query ILIKE '%pg_notify%')`,
          );
          return cut.length > 0;
        });
      }
      markers.forEach((marker) => ledger.letGo(marker));
      await expectWhole(chaos, await Promise.all(streams), { speakers });
      const calls = ledger.calls.filter(({ marker }) => markers.includes(marker));
      expect(calls).toHaveLength(markers.length);
    });
  }, 120_000);
});

import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { Chaos, PATIENCE_MS, START_MS } from '../support/chaos.js';
import type { StackProcess } from '../support/chaos.js';
import { expectWhole } from '../support/chaos-checks.js';
import { whileLocked } from '../support/database.js';
import type { ClientRun } from '../support/chaos-clients.js';

/** Each of the two ways, at either api process. */
const ROUNDS = 2;
const RUNS_A_ROUND = 5;
const PIECES = 4;
/** A whole test; only ends one that hangs. */
const HANG_MS = 170_000;

let chaos: Chaos;

beforeAll(async () => {
  // Its workers are killed in each round, and an execution of the first one may be met again and again.
  chaos = await Chaos.start({ env: { MAX_LOST_ATTEMPTS: '50' } });
}, START_MS);
afterAll(() => chaos?.stop(), START_MS);

describe('an execution that was accepted', () => {
  it(
    'runs, though processes are killed between its acceptance and its first step',
    async () => {
      await chaos.reporting(async () => {
        const { stack, ledger } = chaos;
        const deployment = await chaos.studio().deploy({ agents: [ledger.agent('a', PIECES, 1)] });
        const runs: ClientRun[] = [];
        for (let round = 0; round < ROUNDS; round++) {
          const api = stack.apis[round];
          if (!api) throw new Error('There is no such process.');
          const work = () => acceptAndKill(deployment, api);
          runs.push(...(await (round === 0 ? work() : outOfReach(work))));
          await startAll();
        }
        expect(runs).toHaveLength(ROUNDS * RUNS_A_ROUND);
        await chaos.ended(runs, PATIENCE_MS);
        expect(new Set(runs.map(({ executionId }) => executionId)).size).toBe(ROUNDS * RUNS_A_ROUND);
        await expectWhole(chaos, runs, { speakers: () => [{ agent_id: 'a', pieces: PIECES }] });
      }, HANG_MS);
    },
    HANG_MS + 10_000,
  );
});

/** No worker can begin a step of them: each is stopped before the acceptance, and killed after it. */
async function acceptAndKill(deployment: string, api: StackProcess): Promise<ClientRun[]> {
  const { workers } = chaos.stack;
  const before = chaos.ledger.calls.length;
  workers.forEach((worker) => worker.kill('SIGSTOP'));
  const accept = () => chaos.client(deployment, chaos.marker(), [api.url]).accept();
  const runs = await Promise.all(Array.from({ length: RUNS_A_ROUND }, accept));
  const stillToRun = new Set(runs.map(({ marker }) => marker));
  const begun = chaos.ledger.calls.slice(before).filter(({ marker }) => stillToRun.has(marker));
  expect(begun).toEqual([]);
  const servers = [api, ...workers];
  await Promise.all(servers.map((server) => server.stop('SIGKILL')));
  return runs;
}

const startAll = () =>
  Promise.all([...chaos.stack.apis, ...chaos.stack.workers].map((server) => server.start()));

/** What is accepted meanwhile does not get into the queue: nobody but a sweep can know of it. */
async function outOfReach(work: () => Promise<ClientRun[]>): Promise<ClientRun[]> {
  const { redis, databaseUrl } = chaos.stack;
  if (redis) {
    await redis.stop('SIGKILL');
    const runs = await work();
    await redis.start();
    return runs;
  }
  let runs: ClientRun[] = [];
  await whileLocked(databaseUrl, 'LOCK TABLE bullmq.job IN SHARE MODE', async () => {
    runs = await work();
    // PostgreSQL does not notice that a client has died while its statement waits, and would carry it out.
    await chaos.sql(
      `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock'`,
    );
  });
  return runs;
}

import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { Chaos, PATIENCE_MS } from '../support/chaos.js';
import { expectWhole } from '../support/chaos-checks.js';
import type { ClientRun } from '../support/chaos-clients.js';
import { expectByChance } from '../support/inconclusive.js';
import { SmallDisk } from '../support/small-disk.js';
import { until } from '../support/studio.js';

const MEGABYTES = 192;
/** So that the write-ahead log does not take all of it. */
const POSTGRES_SETTINGS = { min_wal_size: '32MB', max_wal_size: '48MB', shared_buffers: '16MB' };
const PIECES = 20;
/** How long the disk stays full after a request was refused for it. */
const FULL_MS = 3000;
/** What fills pages: an execution keeps its request. */
const BALLAST = 'x'.repeat(60_000);
const speakers = () => [{ agent_id: 'a', pieces: PIECES }];

const disk = SmallDisk.mount(MEGABYTES);
let chaos: Chaos;
let deployment: string;

beforeAll(async () => {
  if (!disk) return;
  chaos = await Chaos.start({ postgresFolder: disk.folder, postgresSettings: POSTGRES_SETTINGS });
  deployment = await chaos.studio().deploy({ agents: [chaos.ledger.agent('a', PIECES, 25)] });
}, PATIENCE_MS);
afterAll(async () => {
  await chaos?.stop();
  disk?.unmount();
}, PATIENCE_MS);

async function ask(): Promise<{ status: number; retryAfter: string | null }> {
  const request = { deployment_name: deployment, query: chaos.marker('refused'), chat_history: history() };
  const { status, headers } = await chaos.studio().json('/api/workflows/execute/async', {
    method: 'POST',
    body: request,
  });
  return { status, retryAfter: headers.get('retry-after') };
}

/** Not to be compressed away. */
const history = () => [{ actor: 'user', content: `${BALLAST}${chaos.random.next()}` }];

const inTmpfs = disk ? describe : describe.skip;

inTmpfs(`a full disk${disk ? '' : ': mounting a file system is not permitted here'}`, () => {
  it('is answered with 503, and when there is room again everything goes on without a gap', async () => {
    await chaos.reporting(async () => {
      let isOver = false;
      const runs: ClientRun[] = [];
      const crashes: number[] = [];
      const load = async () => {
        while (!isOver) runs.push(await chaos.client(deployment).stream());
      };
      const loading = Promise.all(Array.from({ length: 6 }, load));
      loading.catch(() => undefined); // awaited below, unless something fails first
      try {
        await until(() => runs.length >= 6);
        disk?.fill();
        // What becomes free, such as an old piece of the write-ahead log, is filled up as well.
        const refused = await until(async () => {
          disk?.fill();
          const answer = await ask();
          return answer.status === 202 ? undefined : answer;
        }, PATIENCE_MS);
        // It may end when it can't write its log, as often as it is started again.
        const isUp = await chaos.sql('SELECT 1').catch(() => undefined);
        if (!isUp) crashes.push(Date.now());
        expect(refused).toMatchObject({ status: 503, retryAfter: expect.any(String) });
        await sleep(FULL_MS); // some time in this state
        disk?.free();
        await until(async () => (await ask()).status === 202, PATIENCE_MS);
      } finally {
        isOver = true;
        disk?.free();
      }
      await loading;
      await chaos.ended(runs, PATIENCE_MS);
      await expectWhole(chaos, runs, { speakers, crashes });
      const all = await chaos.sql<{ status: string }>('SELECT DISTINCT status FROM execution');
      expectByChance('executions meanwhile', runs.length, 7);
      expect(all.map(({ status }) => status).filter((status) => status === 'error')).toEqual([]);
      expect([...chaos.stack.apis, ...chaos.stack.workers].map(({ starts }) => starts)).toEqual([1, 1, 1, 1]);
    });
  }, 120_000);
});

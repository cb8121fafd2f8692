import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, it } from '@jest/globals';
import { Chaos, PATIENCE_MS, START_MS } from '../support/chaos.js';
import { expectWhole } from '../support/chaos-checks.js';
import type { ClientRun } from '../support/chaos-clients.js';

const PIECES = 6;
/** So few that some executions have to wait for a worker. */
const CONCURRENCY = 5;
const speakers = () => [{ agent_id: 'a', pieces: PIECES }];

let chaos: Chaos;
let deployment: string;
let limited: string;

beforeAll(async () => {
  chaos = await Chaos.start({ env: { WORKER_CONCURRENCY: String(CONCURRENCY) } });
  const agents = [chaos.ledger.agent('a', PIECES, 10)];
  deployment = await chaos.studio().deploy({ agents });
  limited = await chaos.studio().deploy({ agents }, { max_concurrency: 1 });
}, START_MS);
afterAll(() => chaos?.stop(), START_MS);

/** Some that run, some that wait for a worker, and some that wait for their deployment; all are held where they call a model. */
async function acceptSome(): Promise<ClientRun[]> {
  const { ledger } = chaos;
  const accept = async (name: string) => {
    const marker = chaos.marker(name);
    ledger.hold(marker);
    return chaos.client(name === 'limited' ? limited : deployment, marker).accept();
  };
  const runs: ClientRun[] = [];
  for (let index = 0; index < 4; index++) runs.push(await accept('limited'));
  for (let index = 0; index < 4 * CONCURRENCY; index++) runs.push(await accept('run'));
  const running = new Set<string>();
  while (running.size < 2 * CONCURRENCY) {
    runs.forEach(({ marker }) => ledger.of(marker).length > 0 && running.add(marker));
    if (running.size < 2 * CONCURRENCY) await ledger.changed();
  }
  return runs;
}

async function expectAllToEnd(runs: ClientRun[]): Promise<void> {
  runs.forEach(({ marker }) => chaos.ledger.letGo(marker));
  await chaos.ended(runs, PATIENCE_MS);
  await expectWhole(chaos, runs, { speakers });
}

function redis() {
  const server = chaos.stack.redis;
  if (!server) throw new Error('The stack has no Redis.');
  return server;
}

describe('executions that run, and that wait, while Redis', () => {
  it('is killed and started again, all end', async () => {
    await chaos.reporting(async () => {
      const runs = await acceptSome();
      await redis().restart('SIGKILL');
      await expectAllToEnd(runs);
    });
  }, 120_000);

  it('is emptied, all end', async () => {
    await chaos.reporting(async () => {
      const runs = await acceptSome();
      await redis().flush();
      await expectAllToEnd(runs);
    });
  }, 120_000);

  it('is lost with its data, all end', async () => {
    await chaos.reporting(async () => {
      const runs = await acceptSome();
      await redis().stop('SIGKILL');
      const meanwhile = chaos.client(deployment).accept();
      await rm(join(chaos.stack.folder, 'redis/appendonlydir'), { recursive: true });
      await redis().start();
      await expectAllToEnd([...runs, await meanwhile]);
    });
  }, 120_000);
});

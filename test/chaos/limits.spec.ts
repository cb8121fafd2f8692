import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { Chaos, PATIENCE_MS, START_MS } from '../support/chaos.js';
import { expectWhole } from '../support/chaos-checks.js';
import type { ClientRun } from '../support/chaos-clients.js';
import { until } from '../support/studio.js';

const PIECES = 4;
const MAX_QUEUED = 60;
const speakers = () => [{ agent_id: 'a', pieces: PIECES }];

let chaos: Chaos;

beforeAll(async () => {
  chaos = await Chaos.start({ env: { MAX_QUEUED: String(MAX_QUEUED) } });
}, START_MS);
afterAll(() => chaos?.stop(), START_MS);

/** A deployment of its own with this limit; the most calls at once are counted anew. */
async function deploy(max_concurrency: number): Promise<string> {
  chaos.ledger.peak = chaos.ledger.active;
  return chaos.studio().deploy({ agents: [chaos.ledger.agent('a', PIECES, 20)] }, { max_concurrency });
}

const accept = (deployment: string, marker?: string) => chaos.client(deployment, marker).accept();

/** Accepted in this order, at whatever process. */
async function acceptInTurn(deployment: string, count: number): Promise<ClientRun[]> {
  const runs: ClientRun[] = [];
  while (runs.length < count) runs.push(await accept(deployment));
  return runs;
}

/** Accepted, and held in the middle of its model call. */
async function acceptHeld(deployment: string, name: string): Promise<ClientRun> {
  const marker = chaos.marker(name);
  chaos.ledger.hold(marker);
  return accept(deployment, marker);
}

async function cancel({ executionId }: ClientRun): Promise<void> {
  const { status } = await chaos.studio(1).json(`/api/executions/${executionId}/cancel`, { method: 'POST' });
  expect(status).toBe(202);
}

async function statusesOf(runs: ClientRun[]): Promise<string[]> {
  const rows = await chaos.rows(runs.map(({ executionId }) => executionId));
  const statuses = new Map(rows.map(({ execution_id, status }) => [execution_id, status]));
  return runs.map(({ executionId }) => statuses.get(executionId) ?? 'missing');
}

describe('max_concurrency', () => {
  it('is never exceeded, and is made use of, over two workers', async () => {
    await chaos.reporting(async () => {
      const deployment = await deploy(3);
      const runs = await Promise.all(Array.from({ length: 40 }, () => accept(deployment)));
      await chaos.ended(runs, PATIENCE_MS);
      await expectWhole(chaos, runs, { speakers });
      expect(chaos.ledger.peak).toBe(3);
    });
  }, 120_000);

  it('of 1 runs executions in the order of their acceptance', async () => {
    await chaos.reporting(async () => {
      const runs = await acceptInTurn(await deploy(1), 20);
      await chaos.ended(runs, PATIENCE_MS);
      await expectWhole(chaos, runs, { speakers });
      const order = runs.map(({ marker }) => marker);
      expect(
        chaos.ledger.calls.map(({ marker }) => marker).filter((marker) => order.includes(marker)),
      ).toEqual(order);
      expect(chaos.ledger.peak).toBe(1);
    });
  }, 120_000);

  it('keeps the places of a killed worker for its executions, and none for ever', async () => {
    await chaos.reporting(async () => {
      const { ledger } = chaos;
      const deployment = await deploy(2);
      const held = [await acceptHeld(deployment, 'held'), await acceptHeld(deployment, 'held')];
      const waiting = await acceptInTurn(deployment, 10);
      const calls = await Promise.all(held.map(({ marker }) => ledger.call(marker)));
      const callers = new Set(await Promise.all(calls.map((call) => chaos.callerOf(call))));
      await Promise.all([...callers].map((worker) => chaos.kill(worker)));
      await Promise.all(held.map(({ marker }) => ledger.call(marker, 2)));
      expect(waiting.flatMap(({ marker }) => ledger.of(marker))).toEqual([]);
      held.forEach(({ marker }) => ledger.letGo(marker));
      await chaos.ended([...held, ...waiting], PATIENCE_MS);
      await expectWhole(chaos, [...held, ...waiting], { speakers });
      expect(ledger.peak).toBe(2);
      const next = [await acceptHeld(deployment, 'next'), await acceptHeld(deployment, 'next')];
      await Promise.all(next.map(({ marker }) => ledger.call(marker)));
      next.forEach(({ marker }) => ledger.letGo(marker));
      await chaos.ended(next, PATIENCE_MS);
    });
  }, 120_000);

  it('gives the place of a cancelled execution to the next one, whether it ran or waited', async () => {
    await chaos.reporting(async () => {
      const { ledger } = chaos;
      const deployment = await deploy(1);
      const running = await acceptHeld(deployment, 'running');
      const waiting = await accept(deployment);
      const last = await accept(deployment);
      await ledger.call(running.marker);
      await cancel(waiting);
      expect(await statusesOf([waiting, last])).toEqual(['cancelled', 'queued']);
      await cancel(running);
      await chaos.ended([running, waiting, last], PATIENCE_MS);
      expect(await statusesOf([running, waiting, last])).toEqual(['cancelled', 'cancelled', 'completed']);
      expect(ledger.of(waiting.marker)).toEqual([]);
    });
  }, 120_000);

  it('that is raised by deploying again lets more in, and a deleted deployment lets go of those that wait', async () => {
    await chaos.reporting(async () => {
      const { ledger } = chaos;
      const deployment = await deploy(1);
      const runs: ClientRun[] = [];
      for (let index = 0; index < 6; index++) runs.push(await acceptHeld(deployment, 'raised'));
      const [first, second, third, ...waiting] = runs;
      await ledger.call(first?.marker ?? '');
      expect(runs.flatMap(({ marker }) => ledger.of(marker))).toHaveLength(1);
      await deployAgain(deployment, 3);
      for (const run of [second, third]) await ledger.call(run?.marker ?? '');
      expect(await statusesOf(waiting)).toEqual(['queued', 'queued', 'queued']);
      expect(ledger.peak).toBe(3);
      const { status } = await chaos
        .studio(1)
        .json(`/api/workflows/deployments/${deployment}`, { method: 'DELETE' });
      expect(status).toBeLessThan(300);
      // The others are called while the first three still hold their places.
      for (const run of waiting) await ledger.call(run.marker);
      expect(ledger.peak).toBe(runs.length);
      runs.forEach(({ marker }) => ledger.letGo(marker));
      await chaos.ended(runs, PATIENCE_MS);
      await expectWhole(chaos, runs, { speakers });
    });
  }, 120_000);
});

/** Stops a deployment and deploys its workflow under the same name. */
async function deployAgain(deployment_name: string, max_concurrency: number): Promise<void> {
  const studio = chaos.studio(1);
  const { body } = await studio.json<{ workflow_id: string }>(`/api/deployments/${deployment_name}`);
  await studio.json(`/api/workflows/deployments/${deployment_name}/stop`, { method: 'POST' });
  const request = { deployment_name, runtime_config: { max_concurrency } };
  const path = `/api/workflows/${body.workflow_id}/deploy`;
  const { status } = await chaos.studio().json(path, { method: 'POST', body: request });
  expect(status).toBe(201);
}

describe('MAX_QUEUED', () => {
  it('refuses with 429 what is too much, loses nothing of the rest, and accepts again after', async () => {
    await chaos.reporting(async () => {
      const { ledger } = chaos;
      const deployment = await deploy(1);
      const held = await acceptHeld(deployment, 'full');
      await ledger.call(held.marker);
      const answers = await Promise.all(
        Array.from({ length: 3 * MAX_QUEUED }, (_, index) => ask(deployment, index)),
      );
      const accepted = answers.filter(({ status }) => status === 202);
      const refused = answers.filter(({ status }) => status === 429);
      expect(accepted.length + refused.length).toBe(answers.length);
      // Each of the two processes adds what it accepted itself to what it last counted.
      expect(accepted.length).toBeGreaterThanOrEqual(MAX_QUEUED - 1);
      expect(accepted.length).toBeLessThanOrEqual(2 * MAX_QUEUED);
      await until(async () => (await ask(deployment)).status === 429);
      for (const { body, headers } of refused) {
        expect(body).toMatchObject({ status: 429, code: 'queue_full' });
        expect(headers.get('content-type')).toContain('application/problem+json');
        expect(Number(headers.get('retry-after'))).toBeGreaterThan(0);
      }
      ledger.letGo(held.marker);
      const runs = accepted.map(({ body, marker }) => ({ ...held, executionId: body.execution_id, marker }));
      await until(async () => (await ask(deployment)).status === 202, PATIENCE_MS);
      await chaos.ended([held, ...runs], PATIENCE_MS);
      await expectWhole(chaos, [held, ...runs], { speakers });
    });
  }, 120_000);
});

/** Asks once, and takes no for an answer. */
async function ask(deployment_name: string, index = 0) {
  const marker = chaos.marker('full');
  const body = { deployment_name, query: marker };
  const answer = await chaos
    .studio(index % 2)
    .json<{ execution_id: string }>('/api/workflows/execute/async', { method: 'POST', body });
  return { ...answer, marker };
}

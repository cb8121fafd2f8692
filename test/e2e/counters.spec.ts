import { setImmediate } from 'node:timers/promises';
import { afterEach, beforeAll, describe, expect, it } from '@jest/globals';
import { Client } from 'pg';
import { RollUps } from '../../src/deployments/roll-ups.js';
import { FOLD } from '../../src/deployments/roll-ups.statements.js';
import { DeploymentRoutes } from '../support/deployments.js';
import type { Deployment } from '../support/deployments.js';
import { EARLIER_END, endsOf } from '../support/earlier-end.js';
import { rounds } from '../support/effort.js';
import { insertExecutions } from '../support/ended-executions.js';
import { echo, until } from '../support/studio.js';
import type { RunningStudio } from '../support/with-studio.js';
import { withStudio } from '../support/with-studio.js';

interface Counters extends Deployment {
  execution_count: number;
  success_count: number;
  error_count: number;
  cancelled_count: number;
  last_executed_at?: string;
  last_error?: string;
}

const server = withStudio();
const { studio } = server;
let routes: DeploymentRoutes;
let holder: Client;

beforeAll(async () => {
  routes = new DeploymentRoutes(server.url);
});
afterEach(() => holder?.end());

const read = async (name: string, at = studio) => (await at.json<Counters>(`/api/deployments/${name}`)).body;
const counts = ({ execution_count, success_count, error_count, cancelled_count }: Counters) => ({
  execution_count,
  success_count,
  error_count,
  cancelled_count,
});
const waiting = async (deploymentId: string) => {
  const [row] = await server.database.query<{ count: number }>(
    'SELECT count(*)::int AS count FROM counter_delta WHERE deployment_id = $1',
    [deploymentId],
  );
  return row?.count;
};
const allAdded = (deploymentId: string) =>
  until(async () => ((await waiting(deploymentId)) === 0 ? true : undefined));

/** As a process does that is cut off inside of a transaction in which it deploys. */
async function holdDeployment(deploymentId: string): Promise<void> {
  holder = new Client({ connectionString: server.database.url });
  await holder.connect();
  await holder.query('BEGIN');
  await holder.query(`UPDATE deployment SET status = status WHERE deployment_id = $1`, [deploymentId]);
}

/** How often each deployment is executed whose ends are held up. */
const EACH = rounds(17, 5);

describe('a deployment that somebody has locked', () => {
  it('keeps no execution from its end, its own neither, and the counters hold all ends at once', async () => {
    const names = await Promise.all([1, 2, 3].map(() => studio.deploy(echo())));
    const [held = '', ...others] = names;
    const { deployment_id } = await read(held);
    await holdDeployment(deployment_id);
    const answers = await Promise.all(
      Array.from({ length: 3 * EACH }, (_, index) =>
        studio.execute<{ status: string }>({ deployment_name: names[index % 3], query: 'x' }),
      ),
    );
    expect(answers.map(({ status }) => status)).toEqual(answers.map(() => 200));
    const all = { execution_count: EACH, success_count: EACH, error_count: 0, cancelled_count: 0 };
    for (const name of names) expect(counts(await read(name))).toEqual(all);
    const listed = await studio.json<{ items: Counters[] }>('/api/deployments');
    expect(listed.body.items.find((item) => item.deployment_name === held)).toMatchObject(all);
    const active = await studio.json<Counters[]>('/api/workflows/deployments/active');
    expect(active.body.find((item) => item.deployment_name === held)).toMatchObject(all);
    const statistics = await studio.json<Counters>(`/api/deployments/${held}/statistics`);
    expect(statistics.body).toMatchObject(all);
    // Others are not kept from being added, and the locked one is left for later.
    for (const name of others) await allAdded((await read(name)).deployment_id);
    expect(await waiting(deployment_id)).toBe(EACH);
    await holder.query('ROLLBACK');
    await allAdded(deployment_id);
    for (const name of names) expect(counts(await read(name))).toEqual(all);
  });
});

describe('the counters of deployments', () => {
  const query = <Row extends object>(text: string, values?: unknown[]) =>
    server.database.query<Row>(text, values);

  async function unfinished(deployment: Deployment, count: number) {
    const running = Array.from({ length: count }, () => ({
      status: 'running',
      finishedAt: null,
      durationMs: 100,
    }));
    const ids = await insertExecutions(server.database, deployment, running);
    await query(
      `INSERT INTO execution_chunk (execution_id, first_sequence, last_sequence, chunks) SELECT id, 1, 1, '{}' FROM unnest($1::uuid[]) AS id`,
      [ids],
    );
    return ids.map((execution_id) => ({ execution_id, fence: 7 }));
  }

  it('count the ends that a process of an earlier release writes once, beside those of this one', async () => {
    const deployment = await routes.deployed();
    await studio.execute({ deployment_name: deployment.deployment_name, query: 'x' });
    await query(EARLIER_END.text, endsOf(await unfinished(deployment, 3), 'error'));
    const expected = { execution_count: 4, success_count: 1, error_count: 3, cancelled_count: 0 };
    expect(counts(await read(deployment.deployment_name))).toEqual(expected);
    await allAdded(deployment.deployment_id);
    const after = await read(deployment.deployment_name);
    expect(counts(after)).toEqual(expected);
    expect(after.last_error).toBe('it failed at an earlier release');
    // What an earlier release reads itself.
    const [row] = await query<Counters>('SELECT * FROM deployment WHERE deployment_id = $1', [
      deployment.deployment_id,
    ]);
    expect(row && counts(row)).toEqual(expected);
    const { body } = await studio.json<Counters>(
      `/api/deployments/${deployment.deployment_name}/statistics?from=2026-01-01&bucket=day`,
    );
    expect(counts(body)).toEqual(expected);
  });

  it('are exact while ends, two processes that add them, and some that die while they do come together', async () => {
    const [executions, ends] = [rounds(10, 3), rounds(5, 1)];
    const other = await server.startAnother();
    const client = new Client({ connectionString: server.database.url });
    await client.connect();
    try {
      const deployments = await Promise.all([routes.deployed(), routes.deployed(), routes.deployed()]);
      let ended = false;
      const add = async (app: RunningStudio) => {
        while (!ended) {
          await app.app.get(RollUps).fold();
          await setImmediate();
        }
      };
      const die = async () => {
        for (; !ended; await client.query('ROLLBACK')) {
          await client.query('BEGIN');
          await client.query(FOLD.text, [2000]);
        }
      };
      const watch = async () => {
        const last = new Map<string, number>();
        while (!ended) {
          for (const { deployment_name } of deployments) {
            const { execution_count } = await read(deployment_name);
            expect(execution_count).toBeGreaterThanOrEqual(last.get(deployment_name) ?? 0);
            last.set(deployment_name, execution_count);
          }
        }
      };
      const background = [add(server), add(other), die(), watch()];
      const statuses = ['completed', 'error', 'cancelled'];
      await Promise.all([
        ...deployments.flatMap(({ deployment_name }) =>
          Array.from({ length: executions }, () => studio.execute({ deployment_name, query: 'x' })),
        ),
        ...deployments.flatMap((deployment) =>
          statuses.map(async (status) => {
            for (let round = 0; round < ends; round++) {
              await query(EARLIER_END.text, endsOf(await unfinished(deployment, 2), status));
            }
          }),
        ),
      ]).finally(() => (ended = true));
      await Promise.all(background);
      const expected = {
        execution_count: executions + 6 * ends,
        success_count: executions + 2 * ends,
        error_count: 2 * ends,
        cancelled_count: 2 * ends,
      };
      for (const { deployment_id, deployment_name } of deployments) {
        expect(counts(await read(deployment_name))).toEqual(expected);
        await allAdded(deployment_id);
        expect(counts(await read(deployment_name))).toEqual(expected);
        const from = new Date(Date.now() - 3_600_000).toISOString();
        const statistics = await studio.json<Counters>(
          `/api/deployments/${deployment_name}/statistics?from=${from}`,
        );
        expect(counts(statistics.body)).toEqual(expected);
      }
    } finally {
      await client.end();
      await other.close();
    }
  });

  it('and statistics of a deployment that was deleted go with it', async () => {
    const deployment = await routes.deployed();
    await studio.execute({ deployment_name: deployment.deployment_name, query: 'x' });
    await allAdded(deployment.deployment_id);
    const left = await unfinished(deployment, 2);
    await routes.remove(deployment.deployment_name).expect(204);
    await query(EARLIER_END.text, endsOf(left, 'completed'));
    await allAdded(deployment.deployment_id);
    await server.app.get(RollUps).prune();
    const rows = await query('SELECT 1 FROM execution_statistics WHERE deployment_id = $1', [
      deployment.deployment_id,
    ]);
    expect(rows).toEqual([]);
  });
});

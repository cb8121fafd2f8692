import { beforeAll, describe, expect, it } from '@jest/globals';
import request from 'supertest';
import { v7 as uuidv7 } from 'uuid';
import { DeploymentsService } from '../../src/deployments/deployments.service.js';
import { ExampleSeed } from '../../src/deployments/example.seed.js';
import { supportDeskId } from '../../src/workflows/example.js';
import { startTestApp } from '../support/app.js';
import { createTestDatabase } from '../support/database.js';
import type { TestDatabase } from '../support/database.js';
import { DeploymentRoutes, saying } from '../support/deployments.js';
import type { Deployment } from '../support/deployments.js';
import { itInFull } from '../support/effort.js';
import { failureOf } from '../support/models.js';
import { withStudio } from '../support/with-studio.js';

const NUL = String.fromCharCode(0);

const server = withStudio();
let routes: DeploymentRoutes;
let deployments: DeploymentsService;

beforeAll(async () => {
  routes = new DeploymentRoutes(server.url);
  deployments = server.app.get(DeploymentsService);
});

describe('finding what to execute', () => {
  it('takes production before a newer environment, and the active before the stopped', async () => {
    const { deployment_name, deployment_id } = await routes.deployed();
    const { deployment_id: staging } = await routes.deployed({ deployment_name, environment: 'staging' });
    expect(await deployments.findActive(deployment_name)).toMatchObject({ deployment_id });
    expect((await deployments.findActive(deployment_name, 'staging')).deployment_id).toBe(staging);
    await routes.stop(deployment_name, { environment: 'production' });
    expect((await deployments.findActive(deployment_name)).deployment_id).toBe(staging);
  });

  it('says whether a deployment is unknown or stopped', async () => {
    const { deployment_name } = await routes.deployed();
    const { stopped_at } = (await routes.stop(deployment_name)).body as Deployment;
    const stopped = await failureOf(deployments.findActive(deployment_name));
    expect(stopped.message).toContain(`stopped at ${stopped_at}`);
    const unknown = await failureOf(deployments.findActive(deployment_name, 'elsewhere'));
    expect(unknown.message).toContain(`no deployment "${deployment_name}" in the environment "elsewhere"`);
  });

  it.each([
    [NUL, undefined],
    ['', undefined],
    ['a'.repeat(5000), undefined],
    ['a', NUL],
    ['a', ''],
  ])('answers a name that PostgreSQL would refuse as unknown (case %#)', async (name, environment) => {
    const failure = await failureOf(deployments.findActive(name, environment));
    expect(failure.code).toBe('deployment_not_found');
    expect(failure.message.length).toBeLessThan(300);
  });

  it('keeps no more revisions than are as long together as a process may keep', async () => {
    const agents = Array.from({ length: 9 }, (_, index) => ({
      agent_id: `a${index}`,
      agent_type: 'template',
      config: { template: 'x'.repeat(100_000) },
    }));
    const ids: string[] = [];
    for (let count = 0; count < 6; count++) {
      const name = await server.studio.deploy({ agents });
      const { body } = await server.studio.json<Deployment>(`/api/deployments/${name}`);
      ids.push(body.revision_id);
    }
    const [oldest = '', ...others] = ids;
    const first = await deployments.revision(oldest);
    for (const id of others) await deployments.revision(id);
    const last = others.at(-1) ?? '';
    expect(await deployments.revision(last)).toBe(await deployments.revision(last));
    expect(await deployments.revision(oldest)).not.toBe(first);
  });

  it('compiles a revision once for all who ask at the same time, and keeps it', async () => {
    const { revision_id } = await routes.deployed();
    const [first, ...others] = await Promise.all(
      Array.from({ length: 50 }, () => deployments.revision(revision_id)),
    );
    for (const other of others) expect(other).toBe(first);
    expect(await deployments.revision(revision_id)).toBe(first);
    expect(first).toMatchObject({ revision_id, runtime_config: {} });
  });

  it('does not keep a failure', async () => {
    const { revision_id } = await routes.deployed();
    const setTo = (configuration: object) =>
      server.database.query('UPDATE deployment_revision SET configuration = $2 WHERE revision_id = $1', [
        revision_id,
        configuration,
      ]);
    await setTo({ agents: [] });
    expect((await failureOf(deployments.revision(revision_id))).code).toBe('workflow_invalid');
    await setTo(saying('again'));
    expect((await deployments.revision(revision_id)).graph.agents.size).toBe(1);
  });

  it('forgets the revision that was not used for longest', async () => {
    const { revision_id: used } = await routes.deployed();
    const { revision_id: unused } = await routes.deployed();
    const rows = Array.from({ length: 499 }, () => uuidv7());
    await server.database.query(
      'INSERT INTO deployment_revision SELECT id, id, $2, $3 FROM unnest($1::uuid[]) AS id',
      [rows, saying('one of many'), {}],
    );
    const before = await Promise.all([used, unused].map((id) => deployments.revision(id)));
    await deployments.revision(used);
    for (const id of rows) await deployments.revision(id);
    const after = await Promise.all([used, unused].map((id) => deployments.revision(id)));
    expect(after[0]).toBe(before[0]);
    expect(after[1]).not.toBe(before[1]);
  });
});

describe('the seeded example', () => {
  const count = async (of: { database: TestDatabase }) =>
    of.database.query(
      'SELECT workflow_id, deployment_name, status FROM workflow LEFT JOIN deployment USING (workflow_id)',
    );
  const SEEDED = { workflow_id: supportDeskId, deployment_name: 'support-desk', status: 'active' };

  it('is there once, however many processes start, and does not come back', async () => {
    const database = await createTestDatabase();
    const start = () => startTestApp({ SEED_EXAMPLE: 'true' }, database);
    const apps = await Promise.all([start(), start(), start()]);
    const [first] = apps;
    if (!first) throw new Error('No app was started.');
    try {
      expect(await count(first)).toEqual([SEEDED]);
      const { revision_id } = await first.app.get(DeploymentsService).findActive('support-desk');
      expect((await first.app.get(DeploymentsService).revision(revision_id)).graph.agents.size).toBe(4);
      await request(first.url).post('/api/workflows/deployments/support-desk/stop').expect(200);
      apps.push(await start());
      expect(await count(first)).toEqual([{ ...SEEDED, status: 'inactive' }]);
    } finally {
      for (const app of apps) await app.close();
      await database.drop();
    }
  });

  itInFull('is made once by processes that are at it in the same moment', async () => {
    const one = await startTestApp({ SEED_EXAMPLE: 'true' });
    try {
      const seed = one.app.get(ExampleSeed);
      for (let round = 0; round < 5; round++) {
        await one.database.query('DELETE FROM workflow');
        await one.database.query('DELETE FROM deployment');
        await Promise.all(Array.from({ length: 8 }, () => seed.onApplicationBootstrap()));
        expect(await count(one)).toEqual([SEEDED]);
      }
    } finally {
      await one.close();
    }
  });

  it('is not there unless it is asked for', async () => {
    expect(
      await server.database.query('SELECT 1 FROM workflow WHERE workflow_id = $1', [supportDeskId]),
    ).toEqual([]);
  });
});

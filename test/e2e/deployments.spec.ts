import { beforeAll, describe, expect, it, jest } from '@jest/globals';
import request from 'supertest';
import { DeploymentsService } from '../../src/deployments/deployments.service.js';
import { WorkflowsService } from '../../src/workflows/workflows.service.js';
import { DeploymentRoutes, saying } from '../support/deployments.js';
import type { Deployment } from '../support/deployments.js';
import { failureOf } from '../support/models.js';
import { withStudio } from '../support/with-studio.js';

const UNKNOWN_ID = '01900000-0000-7000-8000-00000000ffff';
const NUL = String.fromCharCode(0);

const server = withStudio();
let routes: DeploymentRoutes;
let deployments: DeploymentsService;

beforeAll(async () => {
  routes = new DeploymentRoutes(server.url);
  deployments = server.app.get(DeploymentsService);
});

describe('deploying', () => {
  it('compiles outside of any transaction, and deploys what it compiled', async () => {
    const workflows = server.app.get(WorkflowsService);
    const workflow_id = await routes.createWorkflow();
    const changed = { ...saying('changed meanwhile'), connections: [] };
    const compile = jest.spyOn(workflows, 'compile').mockImplementationOnce(async (...args) => {
      // It would wait for a transaction that holds the row.
      await workflows.update(workflow_id, { configuration: changed });
      return workflows.compile(...args);
    });
    try {
      const deployment_name = routes.uniqueName();
      await routes.deploy(workflow_id, { deployment_name }).expect(201);
      expect(await deployments.get(deployment_name)).toMatchObject({ configuration: changed });
    } finally {
      compile.mockRestore();
    }
  });

  it('answers with the whole deployment', async () => {
    const workflow_id = await routes.createWorkflow({ name: 'polite greeter' });
    const deployment_name = routes.uniqueName();
    const response = await routes.deploy(workflow_id, { deployment_name }).expect(201);
    const body = response.body as Deployment;
    expect(body).toEqual({
      deployment_id: expect.any(String),
      deployment_name,
      environment: 'production',
      workflow_id,
      workflow_name: 'polite greeter',
      revision_id: expect.any(String),
      status: 'active',
      deployed_at: new Date(body.deployed_at).toISOString(),
      execution_count: 0,
      success_count: 0,
      error_count: 0,
      cancelled_count: 0,
    });
    const { location } = response.headers;
    expect(location).toBe(`/api/deployments/${deployment_name}?environment=production`);
    const details = await request(server.url).get(String(location)).expect(200);
    expect(details.body).toEqual({ ...body, configuration: saying('hello'), runtime_config: {} });
  });

  it('keeps who deployed it and how it runs', async () => {
    const runtime_config = {
      timeout: 0.5,
      max_retries: 0,
      allowed_overrides: ['temperature', 'variables'],
      variables: { toString: 'kept', text: NUL, list: [1, null, { a: {} }] },
    };
    const body = {
      deployment_name: routes.uniqueName(),
      environment: 'eu-1_a',
      deployed_by: 'Ada 🙂',
      runtime_config,
    };
    await routes.deploy(await routes.createWorkflow(), body).expect(201);
    expect((await routes.get(body.deployment_name).expect(200)).body).toMatchObject(body);
  });

  it.each([
    ['/deployment_name', { deployment_name: undefined }],
    ['/deployment_name', { deployment_name: '' }],
    ['/deployment_name', { deployment_name: '-a' }],
    ['/deployment_name', { deployment_name: 'a/b' }],
    ['/deployment_name', { deployment_name: 'a\n' }],
    ['/deployment_name', { deployment_name: `a${NUL}` }],
    ['/deployment_name', { deployment_name: 'x'.repeat(101) }],
    ['/deployment_name', { deployment_name: ['a'] }],
    ['/environment', { environment: 'Production' }],
    ['/environment', { environment: '' }],
    ['/environment', { environment: 'x'.repeat(51) }],
    ['/deployed_by', { deployed_by: NUL }],
    ['/deployed_by', { deployed_by: '' }],
    ['/runtime_config', { runtime_config: [] }],
    ['/runtime_config', { runtime_config: 'x' }],
    ['/runtime_config/retries', { runtime_config: { retries: 1 } }],
    ['/runtime_config/timeout', { runtime_config: { timeout: 0 } }],
    ['/runtime_config/timeout', { runtime_config: { timeout: 86_401 } }],
    ['/runtime_config/timeout', { runtime_config: { timeout: '5' } }],
    ['/runtime_config/max_retries', { runtime_config: { max_retries: 11 } }],
    ['/runtime_config/max_retries', { runtime_config: { max_retries: 0.5 } }],
    ['/runtime_config/allowed_overrides', { runtime_config: { allowed_overrides: ['system_prompt'] } }],
    ['/runtime_config/allowed_overrides', { runtime_config: { allowed_overrides: 'model' } }],
    ['/runtime_config/variables', { runtime_config: { variables: [] } }],
    ['/status', { status: 'active' }],
  ])('answers a bad %s with 400 and never with 500 (case %#)', async (pointer, fields) => {
    const body = { deployment_name: routes.uniqueName(), ...fields };
    const response = await routes.deploy(await routes.createWorkflow(), body).expect(400);
    const problem = response.body as { code: string; errors: { pointer: string }[] };
    expect(problem.code).toBe('validation_failed');
    expect(problem.errors.map((fault) => fault.pointer)).toContain(pointer);
  });

  it('refuses an unknown and an inactive workflow', async () => {
    const deployment_name = routes.uniqueName();
    const unknown = await routes.deploy(UNKNOWN_ID, { deployment_name }).expect(404);
    expect(unknown.body).toMatchObject({ code: 'workflow_not_found' });
    const inactive = await routes
      .deploy(await routes.createWorkflow({ is_active: false }), { deployment_name })
      .expect(409);
    expect(inactive.body).toMatchObject({ code: 'workflow_inactive' });
    await routes.get(deployment_name).expect(404);
  });

  it('refuses a workflow whose model provider was removed, and leaves nothing behind', async () => {
    const workflow_id = await routes.createWorkflow();
    const gone = { agents: [{ agent_id: 'a', agent_type: 'llm', config: { model: 'gone/model' } }] };
    await server.database.query('UPDATE workflow SET configuration = $2 WHERE workflow_id = $1', [
      workflow_id,
      gone,
    ]);
    const deployment_name = routes.uniqueName();
    const response = await routes.deploy(workflow_id, { deployment_name }).expect(422);
    expect(response.body).toMatchObject({
      code: 'workflow_invalid',
      errors: [{ pointer: '/configuration/agents/0/config/model' }],
    });
    await routes.get(deployment_name).expect(404);
  });

  it('gives a name to one of many that want it at once', async () => {
    const workflow_id = await routes.createWorkflow();
    const [fresh, stopped] = [routes.uniqueName(), routes.uniqueName()];
    for (const deployment_name of [fresh, stopped, stopped, stopped]) {
      const responses = await Promise.all(
        Array.from({ length: 20 }, () => routes.deploy(workflow_id, { deployment_name })),
      );
      expect(responses.map(({ status }) => status).sort((a, b) => a - b)).toEqual([
        201,
        ...Array<number>(19).fill(409),
      ]);
      for (const { status, body } of responses) {
        if (status === 409) expect(body).toMatchObject({ code: 'deployment_exists' });
      }
      await routes.stop(deployment_name).expect(200);
    }
  });

  it('takes a name once in each environment', async () => {
    const { deployment_name } = await routes.deployed();
    await routes.deployed({ deployment_name, environment: 'staging' });
    await routes
      .deploy(await routes.createWorkflow(), { deployment_name, environment: 'staging' })
      .expect(409);
  });

  it('makes a stopped name active again, with its counters, for any workflow', async () => {
    const first = await routes.deployed();
    const { deployment_name, deployment_id } = first;
    await server.database.query(
      `WITH folding AS (SELECT set_config('agent_studio.folds_counters', 'on', true))
       UPDATE deployment SET execution_count = 3, error_count = 1, success_count = 2 FROM folding WHERE deployment_id = $1`,
      [deployment_id],
    );
    await routes.stop(deployment_name).expect(200);
    const second = await routes.deployed({ deployment_name });
    expect(second).toMatchObject({ deployment_id, status: 'active', execution_count: 3, error_count: 1 });
    expect(second).not.toHaveProperty('stopped_at');
    expect(second.revision_id).not.toBe(first.revision_id);
    expect(second.workflow_id).not.toBe(first.workflow_id);
    const revisions = await server.database.query(
      'SELECT revision_id FROM deployment_revision WHERE deployment_id = $1 ORDER BY revision_id',
      [deployment_id],
    );
    expect(revisions).toEqual([{ revision_id: first.revision_id }, { revision_id: second.revision_id }]);
  });

  it('is not changed by a later change of the workflow', async () => {
    const { deployment_name, workflow_id } = await routes.deployed();
    const change = { configuration: saying('changed') };
    await request(server.url).put(`/api/workflows/${workflow_id}`).send(change).expect(200);
    expect((await routes.get(deployment_name)).body).toMatchObject({ configuration: saying('hello') });
    await routes.stop(deployment_name).expect(200);
    await routes.deploy(workflow_id, { deployment_name }).expect(201);
    expect((await routes.get(deployment_name)).body).toMatchObject({ configuration: saying('changed') });
  });
});

describe('reading deployments', () => {
  const environment = 'reading';
  const list = async (query: object) => {
    const response = await request(server.url).get('/api/deployments').query(query).expect(200);
    return response.body as { items: Deployment[]; next_cursor?: string };
  };

  it('pages through all of them without gap or repeat', async () => {
    const ids: string[] = [];
    for (let i = 0; i < 5; i++) ids.unshift((await routes.deployed({ environment })).deployment_id);
    const seen: string[] = [];
    let cursor: string | undefined;
    let pages = 0;
    do {
      const page = await list({ environment, limit: 2, cursor });
      seen.push(...page.items.map(({ deployment_id }) => deployment_id));
      cursor = page.next_cursor;
      pages++;
    } while (cursor);
    expect(seen).toEqual(ids);
    expect(pages).toBe(3);
    expect(await list({ environment, limit: 5 })).not.toHaveProperty('next_cursor');
  });

  it('filters by status, without the configurations', async () => {
    const { items } = await list({ environment });
    const [newest] = items;
    await routes.stop(newest?.deployment_name ?? '', { environment }).expect(200);
    expect((await list({ environment, status: 'inactive' })).items).toEqual([
      expect.objectContaining({ deployment_id: newest?.deployment_id, status: 'inactive' }),
    ]);
    expect((await list({ environment, status: 'active' })).items).toHaveLength(items.length - 1);
    expect(newest).not.toHaveProperty('configuration');
  });

  it.each(['status=stopped', 'environment=%00', 'limit=0', 'limit=1001', 'cursor=x', 'cursor=%00', 'name=x'])(
    'answers ?%s with 400',
    async (query) => {
      const response = await request(server.url).get(`/api/deployments?${query}`).expect(400);
      expect(response.body).toMatchObject({ code: 'validation_failed' });
    },
  );

  it('lists the active ones with their workflow and counters', async () => {
    const active = await routes.deployed();
    const stopped = await routes.deployed();
    await routes.stop(stopped.deployment_name).expect(200);
    const response = await request(server.url).get('/api/workflows/deployments/active').expect(200);
    const all = response.body as Deployment[];
    expect(all).toContainEqual(active);
    expect(all[0]).toMatchObject({ workflow_name: 'greeter', execution_count: 0 });
    expect(new Set(all.map(({ status }) => status))).toEqual(new Set(['active']));
  });

  it('finds production first, then the newest, active or not', async () => {
    const deployment_name = routes.uniqueName();
    const environmentOf = async (query: object = {}) =>
      ((await routes.get(deployment_name, query).expect(200)).body as Deployment).environment;
    await routes.deployed({ deployment_name, environment: 'b' });
    await routes.deployed({ deployment_name, environment: 'a' });
    expect(await environmentOf()).toBe('a');
    await routes.deployed({ deployment_name });
    await routes.stop(deployment_name, { environment: 'production' }).expect(200);
    expect(await environmentOf()).toBe('production');
    expect(await environmentOf({ environment: 'b' })).toBe('b');
    await routes.get(deployment_name, { environment: 'c' }).expect(404);
  });

  it('leaves out the name of a workflow that was deleted', async () => {
    const { deployment_name, workflow_id } = await routes.deployed();
    await routes.stop(deployment_name).expect(200);
    await request(server.url).delete(`/api/workflows/${workflow_id}`).expect(204);
    const { body } = await routes.get(deployment_name).expect(200);
    expect(body).toMatchObject({ workflow_id, configuration: saying('hello') });
    expect(body).not.toHaveProperty('workflow_name');
  });

  it.each(['unknown', '%00', 'a%2Fb', '%F0%9F%99%82', 'x'.repeat(3000)])(
    'answers a name that there is not with 404 (case %#)',
    async (name) => {
      const answers = [
        routes.get(name),
        routes.get(`${name}/statistics`),
        routes.stop(name),
        routes.remove(name),
      ];
      for (const { status, body } of await Promise.all(answers)) {
        expect(status).toBe(404);
        expect(body).toMatchObject({ code: 'deployment_not_found' });
        expect((body as { detail: string }).detail.length).toBeLessThan(250);
      }
    },
  );
});

describe('stopping and deleting', () => {
  it('stops once: a second stop changes nothing', async () => {
    const { deployment_name } = await routes.deployed();
    const first = await routes.stop(deployment_name).expect(200);
    expect(first.body).toMatchObject({
      status: 'inactive',
      stopped_at: expect.any(String),
      workflow_name: 'greeter',
    });
    const second = await routes.stop(deployment_name).expect(200);
    expect(second.body).toEqual(first.body);
  });

  it('stops what an execution would have used, not a stopped production', async () => {
    const { deployment_name } = await routes.deployed();
    await routes.deployed({ deployment_name, environment: 'staging' });
    await routes.stop(deployment_name).expect(200);
    expect((await deployments.findActive(deployment_name)).environment).toBe('staging');
    expect((await routes.stop(deployment_name).expect(200)).body).toMatchObject({ environment: 'staging' });
    expect((await failureOf(deployments.findActive(deployment_name))).code).toBe('deployment_not_found');
  });

  it('deletes the record, and keeps what running executions need', async () => {
    const { deployment_name, revision_id } = await routes.deployed();
    await routes.remove(deployment_name).expect(204);
    await routes.remove(deployment_name).expect(404);
    await routes.get(deployment_name).expect(404);
    expect((await deployments.revision(revision_id)).graph.agents.size).toBe(1);
    expect(await routes.deployed({ deployment_name })).toMatchObject({ execution_count: 0 });
  });

  it('deletes in the environment that was named', async () => {
    const { deployment_name } = await routes.deployed();
    await routes.deployed({ deployment_name, environment: 'staging' });
    await routes.remove(deployment_name, { environment: 'staging' }).expect(204);
    expect((await routes.get(deployment_name)).body).toMatchObject({ environment: 'production' });
    await routes.remove(deployment_name, { environment: 'X' }).expect(400);
  });
});

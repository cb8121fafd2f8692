import { describe, expect, it } from '@jest/globals';
import request from 'supertest';
import { WorkflowsService } from '../../src/workflows/workflows.service.js';
import { supportDesk } from '../../src/workflows/example.js';
import { Evaluator } from '../../src/engine/evaluation.js';
import { OutputMemory } from '../../src/engine/output-memory.js';
import { runGraph } from '../../src/engine/runner.js';
import { ModelRegistry } from '../../src/models/model-registry.js';
import { rounds } from '../support/effort.js';
import { expectByChance } from '../support/inconclusive.js';
import { withStudio } from '../support/with-studio.js';

const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}$/;
const UNKNOWN_ID = '01900000-0000-7000-8000-00000000ffff';
const NUL = String.fromCharCode(0);
const LONE_SURROGATE = String.fromCharCode(0xd800);

const oneAgent = { agents: [{ agent_id: 'a', agent_type: 'llm', config: { model: 'offline/echo' } }] };

const server = withStudio();
let names = 0;

const uniqueName = () => `workflow ${++names}`;

interface Workflow {
  workflow_id: string;
  name: string;
  version: string;
  updated_at: string;
}

async function create(fields: object = {}): Promise<Workflow> {
  const body = { name: uniqueName(), configuration: oneAgent, ...fields };
  const response = await request(server.url).post('/api/workflows').send(body).expect(201);
  return response.body as Workflow;
}

function deploy(workflowId: string, body: object) {
  return request(server.url).post(`/api/workflows/${workflowId}/deploy`).send(body);
}

describe('creating a workflow', () => {
  it('does not lose or change a field', async () => {
    const configuration = {
      agents: [
        {
          agent_id: 'a',
          agent_type: 'template',
          name: 'Ä 🙂',
          position: JSON.parse('{"x": 1.5, "toString": "top", "then": {"hasOwnProperty": null}}') as object,
          config: { template: `nul ${NUL} surrogate ${LONE_SURROGATE} line ${String.fromCharCode(0x2028)}` },
        },
      ],
      connections: [],
      metadata: { nested: [[], {}, null, 0, -0.5, 1e21, ''], toString: 'kept' },
    };
    const body = { name: '  Täglich 🙂 ', version: '2026.1+a_b-c', description: 'é\n"', configuration };
    const response = await request(server.url).post('/api/workflows').send(body).expect(201);
    const { workflow_id, created_at, ...rest } = response.body as Record<string, string>;
    expect(workflow_id).toMatch(UUID);
    expect(response.headers.location).toBe(`/api/workflows/${workflow_id}`);
    expect(rest).toEqual({
      name: 'Täglich 🙂',
      version: '2026.1+a_b-c',
      description: 'é\n"',
      configuration,
      is_active: true,
      is_deployed: false,
      updated_at: created_at,
    });
    const read = await request(server.url).get(`/api/workflows/${workflow_id}`).expect(200);
    expect(read.body).toEqual(response.body);
  });

  it('leaves out a description that there is not', async () => {
    for (const fields of [{}, { description: null, version: null, is_active: null }]) {
      const workflow = await create(fields);
      expect(Object.keys(workflow)).not.toContain('description');
      expect(workflow).toMatchObject({ version: '1', is_active: true });
    }
  });

  it('takes the number after the highest whole-number version', async () => {
    const name = uniqueName();
    for (const version of ['9', '10', '2.7', 'v99', '11-beta']) await create({ name, version });
    expect((await create({ name })).version).toBe('11');
    expect((await create({ name })).version).toBe('12');
    const big = '9'.repeat(40);
    await create({ name, version: big });
    expect((await create({ name })).version).toBe(`1${'0'.repeat(40)}`);
  });

  it('gives no version twice to workflows that are created at once', async () => {
    const name = uniqueName();
    const created = await Promise.all(Array.from({ length: 40 }, () => create({ name })));
    const versions = created.map(({ version }) => Number(version)).sort((a, b) => a - b);
    expect(versions).toEqual(Array.from({ length: 40 }, (_, index) => index + 1));
  });

  it('refuses a version that exists', async () => {
    const { name } = await create({ version: 'a' });
    const body = { name, version: 'a', configuration: oneAgent };
    const responses = await Promise.all(
      Array.from({ length: 5 }, () => request(server.url).post('/api/workflows').send(body)),
    );
    for (const { status, body: problem } of responses) {
      expect(status).toBe(409);
      expect(problem).toMatchObject({ code: 'workflow_exists' });
    }
  });

  it.each([
    ['/name', { name: undefined }],
    ['/name', { name: null }],
    ['/name', { name: ' \t ' }],
    ['/name', { name: 7 }],
    ['/name', { name: ['a'] }],
    ['/name', { name: 'x'.repeat(201) }],
    ['/name', { name: `a${NUL}b` }],
    ['/name', { name: `a${LONE_SURROGATE}b` }],
    ['/description', { description: NUL }],
    ['/description', { description: LONE_SURROGATE }],
    ['/description', { description: 'x'.repeat(2001) }],
    ['/description', { description: {} }],
    ['/version', { version: '' }],
    ['/version', { version: 1 }],
    ['/version', { version: '.1' }],
    ['/version', { version: '1\n' }],
    ['/version', { version: 'x'.repeat(51) }],
    ['/version', { version: `1${NUL}` }],
    ['/is_active', { is_active: 'true' }],
    ['/configuration', { configuration: undefined }],
    ['/configuration', { configuration: [] }],
    ['/configuration', { configuration: 'x' }],
    ['/workflow_id', { workflow_id: UNKNOWN_ID }],
  ])('answers a bad %s with 400 and never with 500 (case %#)', async (pointer, fields) => {
    const body = { name: uniqueName(), configuration: oneAgent, ...fields };
    const response = await request(server.url).post('/api/workflows').send(body).expect(400);
    expect(response.type).toBe('application/problem+json');
    const problem = response.body as { code: string; errors: { pointer: string }[] };
    expect(problem.code).toBe('validation_failed');
    expect(problem.errors.map((fault) => fault.pointer)).toContain(pointer);
  });

  it('names every fault of an invalid graph', async () => {
    const configuration = {
      agents: [
        { agent_id: 'a', agent_type: 'llm', config: { model: 'nobody/knows' } },
        { agent_id: 'a', agent_type: 'oracle', config: {} },
      ],
      connections: [{ source_agent_id: 'a', target_agent_id: 'b' }],
    };
    const response = await request(server.url)
      .post('/api/workflows')
      .send({ name: uniqueName(), configuration })
      .expect(422);
    const problem = response.body as { code: string; errors: { pointer: string }[] };
    expect(problem.code).toBe('workflow_invalid');
    expect(problem.errors.map(({ pointer }) => pointer).sort()).toEqual([
      '/configuration/agents/0/config/model',
      '/configuration/agents/1/agent_id',
      '/configuration/agents/1/agent_type',
      '/configuration/connections/0/target_agent_id',
    ]);
  });
});

describe('listing workflows', () => {
  const list = async (query: object) => {
    const response = await request(server.url).get('/api/workflows').query(query).expect(200);
    return (response.body as Workflow[]).map(({ workflow_id }) => workflow_id);
  };

  it('answers a plain array, newest first, in pages without gap or repeat', async () => {
    const name = uniqueName();
    const ids: string[] = [];
    for (let i = 0; i < 5; i++) ids.unshift((await create({ name })).workflow_id);
    expect(await list({ name })).toEqual(ids);
    expect(await list({ name, limit: 2 })).toEqual(ids.slice(0, 2));
    expect(await list({ name, limit: 2, skip: 2 })).toEqual(ids.slice(2, 4));
    expect(await list({ name, skip: 5 })).toEqual([]);
  });

  it('filters by what is active and deployed, together', async () => {
    const name = uniqueName();
    const { workflow_id: idle } = await create({ name });
    const { workflow_id: inactive } = await create({ name, is_active: false });
    const { workflow_id: deployed } = await create({ name });
    const { workflow_id: stopped } = await create({ name });
    await deploy(deployed, { deployment_name: 'filter-1' }).expect(201);
    await deploy(deployed, { deployment_name: 'filter-2' }).expect(201);
    await deploy(stopped, { deployment_name: 'filter-3' }).expect(201);
    await request(server.url).post('/api/workflows/deployments/filter-3/stop').expect(200);
    expect(await list({ name, is_deployed: true })).toEqual([deployed]);
    expect(await list({ name, is_deployed: false })).toEqual([stopped, inactive, idle]);
    expect(await list({ name, is_active: false })).toEqual([inactive]);
    expect(await list({ name, is_active: true, is_deployed: false })).toEqual([stopped, idle]);
    const read = await request(server.url).get(`/api/workflows/${deployed}`);
    expect(read.body).toMatchObject({ is_deployed: true });
  });

  it('takes the name as a part in any case, not as a pattern', async () => {
    const { workflow_id } = await create({ name: 'Rate: 100%_Sure' });
    expect(await list({ name: '100%_sure' })).toEqual([workflow_id]);
    expect(await list({ name: '%' })).toEqual([workflow_id]);
    expect(await list({ name: 'Rate%Sure' })).toEqual([]);
  });

  it.each([
    'limit=0',
    'limit=1001',
    'limit=',
    'limit=1.5',
    'limit=0x10',
    'limit=1&limit=2',
    'skip=-1',
    'skip=2147483648',
    'skip=99999999999999999999',
    'is_active=yes',
    'is_active=',
    'is_deployed=1',
    'name=%00',
    'name=a&name=b',
    'offset=1',
  ])('answers ?%s with 400', async (query) => {
    const response = await request(server.url).get(`/api/workflows?${query}`).expect(400);
    expect(response.body).toMatchObject({ code: 'validation_failed' });
  });
});

describe('changing a workflow', () => {
  it('replaces what is given and nothing else', async () => {
    const before = await create();
    const put = (body: object) => request(server.url).put(`/api/workflows/${before.workflow_id}`).send(body);
    const changed = await put({ description: 'new', is_active: false }).expect(200);
    const { updated_at } = changed.body as Workflow;
    expect(changed.body).toEqual({ ...before, description: 'new', is_active: false, updated_at });
    expect(Date.parse(updated_at)).toBeGreaterThanOrEqual(Date.parse(before.updated_at));

    const nulls = { name: null, version: null, configuration: null, is_active: null, description: null };
    const cleared = await put(nulls).expect(200);
    expect(Object.keys(cleared.body as Workflow)).not.toContain('description');
    expect(cleared.body).toEqual({ ...before, is_active: false, updated_at: expect.any(String) });

    const configuration = { agents: [{ agent_id: 'b', agent_type: 'template', config: { template: '' } }] };
    await put({ name: ' renamed ', version: '7', configuration, is_active: true }).expect(200);
    const read = await request(server.url).get(`/api/workflows/${before.workflow_id}`).expect(200);
    expect(read.body).toMatchObject({ name: 'renamed', version: '7', configuration, is_active: true });
  });

  it('checks as the creation does', async () => {
    const { workflow_id, name } = await create({ version: '1' });
    await create({ name, version: '2' });
    const put = (body: object) => request(server.url).put(`/api/workflows/${workflow_id}`).send(body);
    expect((await put({ version: '2' }).expect(409)).body).toMatchObject({ code: 'workflow_exists' });
    expect((await put({ name: NUL }).expect(400)).body).toMatchObject({ code: 'validation_failed' });
    expect((await put({ created_at: 'now' }).expect(400)).body).toMatchObject({ code: 'validation_failed' });
    const bad = { configuration: { agents: [] } };
    expect((await put(bad).expect(422)).body).toMatchObject({ code: 'workflow_invalid' });
  });
});

describe('deleting a workflow', () => {
  it('is refused while a deployment is active, naming it', async () => {
    const { workflow_id } = await create();
    const url = `/api/workflows/${workflow_id}`;
    await deploy(workflow_id, { deployment_name: 'in-use', environment: 'test' }).expect(201);
    const refused = await request(server.url).delete(url).expect(409);
    expect(refused.body).toMatchObject({ code: 'workflow_in_use' });
    expect((refused.body as { detail: string }).detail).toContain('"in-use" in the environment "test"');
    await request(server.url).post('/api/workflows/deployments/in-use/stop').expect(200);
    await request(server.url).delete(url).expect(204);
    await request(server.url).get(url).expect(404);
    await request(server.url).delete(url).expect(404);
  });

  it('never leaves an active deployment without its workflow when both happen at once', async () => {
    const ends = { deleted: 0, deployed: 0 };
    for (let round = 0; round < rounds(40, 15); round++) {
      const { workflow_id } = await create();
      const calls = [
        () => deploy(workflow_id, { deployment_name: `race-${round}` }),
        () => request(server.url).delete(`/api/workflows/${workflow_id}`),
      ];
      if (round % 2) calls.reverse();
      const statuses = await Promise.all(calls.map(async (call) => (await call()).status));
      const [first = 0, second = 0] = statuses.sort((a, b) => a - b);
      if (first === 204) ends.deleted++;
      else ends.deployed++;
      expect([
        [204, 404],
        [201, 409],
      ]).toContainEqual([first, second]);
    }
    const orphans = await server.database.query(
      `SELECT 1 FROM deployment LEFT JOIN workflow USING (workflow_id) WHERE status = 'active' AND workflow.name IS NULL`,
    );
    expect(orphans).toEqual([]);
    expectByChance('workflows deleted before the deployment', ends.deleted, 1);
    expectByChance('workflows deployed before the deletion', ends.deployed, 1);
  });
});

describe('an id that no workflow has', () => {
  it.each([UNKNOWN_ID, '1', 'deployments', '%00', '%F0%9F%99%82', `${UNKNOWN_ID}0`, 'x'.repeat(3000)])(
    'is answered with 404 and at most 100 of its characters (case %#)',
    async (id) => {
      const url = `/api/workflows/${id}`;
      const calls = [
        request(server.url).get(url),
        request(server.url).put(url).send({ description: 'x' }),
        request(server.url).delete(url),
        request(server.url).post(`${url}/deploy`).send({ deployment_name: 'unknown' }),
      ];
      for (const { status, body } of await Promise.all(calls)) {
        expect(status).toBe(404);
        expect(body).toMatchObject({ code: 'workflow_not_found' });
        expect((body as { detail: string }).detail.length).toBeLessThan(250);
      }
    },
  );
});

describe('the example', () => {
  it.each([
    ['My invoice is wrong.', 'billing', 'technical'],
    ['INVOICE!', 'billing', 'technical'],
    ['The app does not start.', 'technical', 'billing'],
  ])('sends %j to the %s agent and skips the other', async (query, answering, skipped) => {
    const graph = await server.app.get(WorkflowsService).compile(supportDesk.configuration);
    const ends = new Map<string, { status: string; output: string }>();
    const { status } = await runGraph({
      graph,
      input: { query, chat_history: [], overrides: {} },
      models: server.app.get(ModelRegistry, { strict: false }),
      evaluator: server.app.get(Evaluator, { strict: false }),
      limits: { agent: Infinity, execution: Infinity },
      held: server.app.get(OutputMemory, { strict: false }).open(),
      observer: {
        stepStarted: () => undefined,
        content: () => undefined,
        stepFinished: (step) => void ends.set(step.agent_id, step),
      },
      signal: new AbortController().signal,
    });
    expect(status).toBe('completed');
    expect(Object.fromEntries([...ends].map(([agent, end]) => [agent, end.status]))).toEqual({
      triage: 'completed',
      [answering]: 'completed',
      [skipped]: 'skipped',
      editor: 'completed',
    });
    expect(ends.get('editor')?.output).toContain(query);
    expect([...graph.agents.keys()].filter((agent) => graph.answers(agent))).toEqual(['editor']);
  });

  it('can be created from the documentation again and again', async () => {
    const first = await request(server.url).post('/api/workflows').send(supportDesk).expect(201);
    const second = await request(server.url).post('/api/workflows').send(supportDesk).expect(201);
    expect(Number((second.body as Workflow).version)).toBe(Number((first.body as Workflow).version) + 1);
  });
});

import { beforeAll, describe, expect, it } from '@jest/globals';
import { DeploymentRoutes } from '../support/deployments.js';
import { itInFull } from '../support/effort.js';
import { insertExecutions } from '../support/ended-executions.js';
import { echo, faultsOfStream, textOf, until, upstreamAgent } from '../support/studio.js';
import { chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import { withStudio } from '../support/with-studio.js';

interface ExecutionBody {
  execution_id: string;
  status: string;
  response: string;
  links: Record<string, string>;
}
interface StepsBody {
  items: { agent_id: string; status: string; output?: string; started_at?: string; finished_at?: string }[];
}

/** Triage sends invoices to billing and all else to support; an editor joins them. */
const desk = {
  agents: [
    {
      agent_id: 'triage',
      agent_type: 'template',
      config: { template: '{% if query contains "invoice" %}billing{% else %}support{% endif %}' },
    },
    { agent_id: 'billing', agent_type: 'template', config: { template: 'BILLING {{ query }}' } },
    { agent_id: 'support', agent_type: 'template', config: { template: 'SUPPORT {{ query }}' } },
    {
      agent_id: 'editor',
      agent_type: 'template',
      config: { template: '[{{ outputs.billing }}{{ outputs.support }}]' },
    },
  ],
  connections: [
    {
      source_agent_id: 'triage',
      target_agent_id: 'billing',
      connection_type: 'conditional',
      conditions: { expression: 'output == "billing"' },
    },
    {
      source_agent_id: 'triage',
      target_agent_id: 'support',
      connection_type: 'conditional',
      conditions: { expression: 'output == "support"' },
    },
    { source_agent_id: 'billing', target_agent_id: 'editor' },
    { source_agent_id: 'support', target_agent_id: 'editor' },
  ],
};

let release: () => void = () => {};
const server = withStudio({
  upstream: (response) => {
    writeStream(response, chatDelta('first '));
    release = () => {
      writeStream(response, chatDelta('second'), chatEnd());
      response.end();
    };
  },
  env: { HEARTBEAT_INTERVAL_MS: '100' },
});
const { studio } = server;
/** A process that no worker takes anything from, unless a test starts one. */
const idle = withStudio({ env: { ROLE: 'api' } });

describe('execute', () => {
  it('answers with the response, the ids, the usage and the times', async () => {
    const deployment = await studio.deploy(desk);
    const { status, body, headers } = await studio.execute<ExecutionBody>({
      deployment_name: deployment,
      query: 'my invoice',
    });
    expect(status).toBe(200);
    expect(body).toEqual({
      status: 'success',
      response: '[BILLING my invoice]',
      execution_id: expect.stringMatching(/^[0-9a-f-]{36}$/),
      deployment_name: deployment,
      workflow_id: expect.stringMatching(/^[0-9a-f-]{36}$/),
      deployment_id: expect.stringMatching(/^[0-9a-f-]{36}$/),
      usage: { input_tokens: 0, output_tokens: 0 },
      duration_ms: expect.any(Number),
      timestamp: expect.stringMatching(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/),
    });
    expect(headers.get('content-location')).toBe(`/api/executions/${body.execution_id}`);
  });

  it('gives the model the chat history and the overrides', async () => {
    const deployment = await studio.deploy(echo({ system_prompt: 'Speak {{ variables.language }}' }));
    const { body } = await studio.execute<ExecutionBody>({
      deployment_name: deployment,
      query: 'hello',
      chat_history: [
        { actor: 'user', content: 'before' },
        { actor: 'assistant', content: 'yes' },
      ],
      runtime_overrides: { variables: { language: 'Latin' }, agents: { echo: { temperature: 0.1 } } },
    });
    expect(body.response).toContain('Speak Latin');
    expect(body.response).toMatch(/Earlier messages: 2/);
    expect(body.response).toContain('hello');
  });
});

describe('execute/async', () => {
  it('accepts with links that lead to the state, the stream and the end', async () => {
    const deployment = await studio.deploy(desk);
    const accepted = await studio.json<ExecutionBody>('/api/workflows/execute/async', {
      method: 'POST',
      body: { deployment_name: deployment, query: 'it crashes' },
    });
    expect(accepted.status).toBe(202);
    const { execution_id: id, links } = accepted.body;
    const frames = await (await studio.follow(id)).frames();
    expect(faultsOfStream(frames, id)).toEqual([]);
    expect(textOf(frames)).toBe('[SUPPORT it crashes]');
    for (const link of ['self', 'progress', 'steps']) {
      expect((await studio.json(links[link] ?? '')).status).toBe(200);
    }
    expect(links.stream).toBe(`/api/executions/${id}/stream`);
    expect(links.cancel).toBe(`/api/executions/${id}/cancel`);
  });
});

describe('the trace', () => {
  it('tells what ran, what was skipped and how far it is', async () => {
    const deployment = await studio.deploy(desk);
    const { body } = await studio.execute<ExecutionBody>({ deployment_name: deployment, query: 'invoice' });
    const steps = await studio.json<StepsBody>(`/api/executions/${body.execution_id}/steps`);
    const states = Object.fromEntries(steps.body.items.map(({ agent_id, status }) => [agent_id, status]));
    expect(states).toEqual({
      triage: 'completed',
      billing: 'completed',
      support: 'skipped',
      editor: 'completed',
    });
    expect(steps.body.items.find(({ agent_id }) => agent_id === 'billing')?.output).toBe('BILLING invoice');
    const progress = await studio.json(`/api/executions/${body.execution_id}/progress`);
    expect(progress.body).toMatchObject({
      status: 'completed',
      completed_steps: 4,
      total_steps: 4,
      progress: 1,
      running_agents: [],
    });
  });

  it('shows a step that runs', async () => {
    const deployment = await studio.deploy(upstreamAgent());
    const stream = await studio.stream({ deployment_name: deployment, query: 'x' });
    for await (const { chunk } of stream) if (chunk.type === 'content') break;
    const progress = await studio.json(`/api/executions/${stream.executionId}/progress`);
    expect(progress.body).toMatchObject({
      status: 'running',
      completed_steps: 0,
      total_steps: 1,
      running_agents: ['writer'],
    });
    release();
    await until(async () => {
      const { body } = await studio.json<ExecutionBody>(`/api/executions/${stream.executionId}`);
      return body.status === 'completed' ? body : undefined;
    });
  });

  it('is in the stream too for those who include progress, and only for them', async () => {
    const deployment = await studio.deploy(desk);
    const plain = await (await studio.stream({ deployment_name: deployment, query: 'invoice' })).frames();
    expect(new Set(plain.map(({ chunk }) => chunk.type))).toEqual(new Set(['status', 'content']));
    const stream = await studio.stream({
      deployment_name: deployment,
      query: 'invoice',
      include: ['progress'],
    });
    const frames = await stream.frames();
    expect(faultsOfStream(frames, stream.executionId)).toEqual([]);
    const steps = frames.flatMap(({ chunk }) => (typeof chunk.data === 'object' ? [chunk.data] : []));
    expect(steps.at(-1)).toMatchObject({
      agent_id: 'editor',
      status: 'completed',
      completed_steps: 4,
      total_steps: 4,
      progress: 1,
    });
    const between = frames.filter(
      ({ chunk }) => chunk.type === 'progress' && chunk.data === 'BILLING invoice',
    );
    expect(between).toHaveLength(1);
    expect(textOf(frames)).toBe('[BILLING invoice]');
  });
});

describe('the list', () => {
  it('pages through all executions of a deployment, newest first, each once', async () => {
    const deployment = await studio.deploy(echo());
    const ids: string[] = [];
    for (let run = 0; run < 7; run++) {
      const { body } = await studio.execute<ExecutionBody>({ deployment_name: deployment, query: `${run}` });
      ids.unshift(body.execution_id);
    }
    const seen: string[] = [];
    let cursor: string | undefined;
    do {
      const page: { body: { items: ExecutionBody[]; next_cursor?: string } } = await studio.json(
        `/api/executions?deployment_name=${deployment}&limit=3${cursor ? `&cursor=${cursor}` : ''}`,
      );
      seen.push(...page.body.items.map(({ execution_id }) => execution_id));
      cursor = page.body.next_cursor;
    } while (cursor);
    expect(seen).toEqual(ids);
    const failed = await studio.json<{ items: unknown[] }>(
      `/api/executions?deployment_name=${deployment}&status=error`,
    );
    expect(failed.body.items).toEqual([]);
  });
});

describe('the wire', () => {
  it('has the promised headers and frames', async () => {
    const deployment = await studio.deploy(desk);
    const stream = await studio.stream({ deployment_name: deployment, query: 'invoice' });
    await stream.frames();
    expect(stream.status).toBe(200);
    expect(stream.headers.get('content-type')).toBe('text/event-stream; charset=utf-8');
    expect(stream.headers.get('cache-control')).toBe('no-cache, no-transform');
    expect(stream.headers.get('x-accel-buffering')).toBe('no');
    expect(stream.headers.get('content-encoding')).toBeNull();
    expect(stream.headers.get('location')).toBe(`/api/executions/${stream.executionId}/stream`);
    expect(stream.headers.get('access-control-allow-origin')).toBe('*');
    expect(stream.headers.get('access-control-expose-headers')).toContain('Content-Location');
    const blocks = stream.raw.split('\n\n');
    expect(blocks.pop()).toBe('');
    blocks.forEach((block, index) => {
      expect(block).toMatch(index === 0 ? /^retry: \d+\ndata: .+\nid: \S+$/ : /^data: .+\nid: \S+$/);
    });
    expect(stream.raw).not.toContain('\r');
  });

  it('carries a comment while nothing comes, so that no proxy takes the stream for dead', async () => {
    const deployment = await studio.deploy(upstreamAgent());
    const stream = await studio.stream({ deployment_name: deployment, query: 'x' });
    const reading = stream.frames();
    await until(() => /^: heartbeat\n\n/m.test(stream.raw) || undefined);
    release();
    const frames = await reading;
    expect(faultsOfStream(frames, stream.executionId)).toEqual([]);
    expect(textOf(frames)).toBe('first second');
  });

  it('allows a browser of another origin to send what reconnecting needs', async () => {
    const preflight = await fetch(`${server.url}/api/workflows/execute/stream`, {
      method: 'OPTIONS',
      headers: {
        Origin: 'http://app.example',
        'Access-Control-Request-Method': 'POST',
        'Access-Control-Request-Headers': 'content-type,last-event-id',
      },
    });
    expect(preflight.status).toBe(204);
    expect(preflight.headers.get('access-control-allow-headers')).toContain('Last-Event-ID');
  });
});

it('an execution that was accepted before a redeployment runs the graph that it was accepted with', async () => {
  const client = idle.studio;
  const agent = (template: string) => ({
    agents: [{ agent_id: 'a', agent_type: 'template', config: { template } }],
  });
  const deployment = await client.deploy(agent('old'));
  const stream = await client.stream({ deployment_name: deployment, query: 'x' });
  const { body } = await client.json<{ workflow_id: string }>(`/api/deployments/${deployment}`);
  await client.json(`/api/workflows/${body.workflow_id}`, {
    method: 'PUT',
    body: { configuration: agent('new') },
  });
  await client.json(`/api/workflows/deployments/${deployment}/stop`, { method: 'POST' });
  await client.json(`/api/workflows/${body.workflow_id}/deploy`, {
    method: 'POST',
    body: { deployment_name: deployment },
  });
  const worker = await idle.startAnother({ ROLE: 'worker' });
  try {
    expect(textOf(await stream.frames())).toBe('old');
    expect(
      (await client.execute<ExecutionBody>({ deployment_name: deployment, query: 'x' })).body.response,
    ).toBe('new');
  } finally {
    await worker.close();
  }
});

it('a worker answers probes and scrapes, and says who answers the rest', async () => {
  const worker = await idle.startAnother({ ROLE: 'worker' });
  try {
    const client = worker.studio;
    expect((await client.json('/health/ready')).status).toBe(200);
    expect(await client.metric('agent_studio_queue_depth')).toBe(0);
    for (const path of ['/api/executions', '/api/docs', '/api/workflows/execute']) {
      const { status, body } = await client.json<{ code: string; detail: string }>(path);
      expect([status, body.code]).toEqual([404, 'not_found']);
      expect(body.detail).toContain('ROLE=api');
    }
  } finally {
    await worker.close();
  }
});

describe('the list of executions', () => {
  interface Page {
    items: { execution_id: string; status: string }[];
    next_cursor?: string;
  }

  let routes: DeploymentRoutes;

  beforeAll(() => {
    routes = new DeploymentRoutes(idle.url);
  });

  const page = async (query: string) => (await idle.studio.json<Page>(`/api/executions?${query}`)).body;

  /** All pages of a list, and how many there were. */
  async function all(query: string): Promise<{ ids: string[]; pages: number }> {
    const ids: string[] = [];
    for (let pages = 1, cursor = ''; ; pages++) {
      const { items, next_cursor } = await page(`${query}${cursor}`);
      ids.push(...items.map(({ execution_id }) => execution_id));
      if (next_cursor === undefined) return { ids, pages };
      cursor = `&cursor=${next_cursor}`;
    }
  }

  const executions = (count: number, status: string) =>
    Array.from({ length: count }, () => ({
      status,
      finishedAt: status === 'running' ? null : new Date(),
      durationMs: 10,
    }));

  itInFull(
    'a filter that few executions pass looks at so many for a page, and finds all of them over the pages',
    async () => {
      const rare = await routes.deployed();
      const common = await routes.deployed();
      const oldest = await insertExecutions(idle.database, rare, executions(3, 'error'));
      await insertExecutions(idle.database, common, executions(125_000, 'completed'));
      const newest = await insertExecutions(idle.database, rare, [
        ...executions(2, 'running'),
        ...executions(2, 'completed'),
      ]);
      const expected = [...oldest, ...newest].toReversed();
      const first = await page(`deployment_name=${rare.deployment_name}&limit=5`);
      expect(first.items.map(({ execution_id }) => execution_id)).toEqual(newest.toReversed());
      expect(first.next_cursor).toEqual(expect.any(String));
      expect(await all(`deployment_name=${rare.deployment_name}`)).toEqual({ ids: expected, pages: 2 });
      expect((await all(`deployment_name=${rare.deployment_name}&limit=2`)).ids).toEqual(expected);
      expect((await all('status=error&limit=1000')).ids).toEqual(oldest.toReversed());
      // What has not ended is found by an index.
      expect(await all('status=running')).toEqual({ ids: newest.slice(0, 2).toReversed(), pages: 1 });
      expect(await all('status=queued')).toEqual({ ids: [], pages: 1 });
    },
  );

  it('a period bounds what is looked at, and a list of a page has no cursor', async () => {
    const { deployment_name } = await routes.deployed();
    const query = `deployment_name=${deployment_name}`;
    const tomorrow = new Date(Date.now() + 3 * 86_400_000).toISOString();
    for (const period of [
      `from=${tomorrow}`,
      'to=2020-01-01',
      'to=1960-01-01',
      'from=1960-01-01&to=1961-01-01',
    ]) {
      expect(await page(`${query}&${period}`)).toEqual({ items: [] });
    }
  });
});

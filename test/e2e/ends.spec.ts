import { afterEach, beforeAll, expect, it } from '@jest/globals';
import { randomUUID } from 'node:crypto';
import { textOf, until } from '../support/studio.js';
import { withStudio } from '../support/with-studio.js';
import type { RunningStudio } from '../support/with-studio.js';

/** An agent that works for two that answer; none of them is called in these tests. */
const agent = (agent_id: string) => ({
  agent_id,
  agent_type: 'llm',
  config: { model: 'offline/echo', system_prompt: `You are ${agent_id}.` },
});
const definition = {
  agents: [agent('first'), agent('second'), agent('helper')],
  connections: [
    { source_agent_id: 'helper', target_agent_id: 'first' },
    { source_agent_id: 'helper', target_agent_id: 'second' },
  ],
};

const api = withStudio({ env: { ROLE: 'api' } });
const { studio } = api;
let deployment: string;
let workers: RunningStudio[] = [];

beforeAll(async () => {
  deployment = await studio.deploy(definition);
});
afterEach(async () => {
  await Promise.all(workers.map((worker) => worker.close()));
  workers = [];
});

async function startWorker(): Promise<void> {
  workers.push(await api.startAnother({ ROLE: 'worker', JOB_LOCK_MS: '1000' }));
}

interface Execution {
  status: string;
  response?: string;
  error?: { code: string };
  usage: { input_tokens: number; output_tokens: number };
}

async function accept(): Promise<string> {
  const body = { deployment_name: deployment, query: 'What was said?' };
  const answer = await studio.json<{ execution_id: string }>('/api/workflows/execute/async', {
    method: 'POST',
    body,
  });
  expect(answer.status).toBe(202);
  return answer.body.execution_id;
}

/** An execution as a worker leaves it that dies in the middle: its helper is done, and both of the others have begun to speak. */
async function acceptAndDie(): Promise<string> {
  const executionId = await accept();
  const { query } = api.database;
  await query(
    `UPDATE execution SET status = 'running', attempt = 1, fence = 7, started_at = now() WHERE execution_id = $1`,
    [executionId],
  );
  const said = [
    { agent_id: 'second', data: 'Second ' },
    { agent_id: 'first', data: 'First: 🦜 ' },
    { agent_id: 'second', data: 'speaks.' },
  ];
  const chunks = said.map(({ agent_id, data }, index) =>
    JSON.stringify({
      type: 'content',
      data,
      deployment_name: deployment,
      workflow_id: randomUUID(),
      execution_id: executionId,
      sequence: index + 2,
      agent_id,
      timestamp: new Date().toISOString(),
    }),
  );
  await query('INSERT INTO execution_chunk VALUES ($1, 2, 4, $2)', [executionId, chunks.join('\n')]);
  await leaveStep(executionId, { agent_id: 'helper', status: 'completed', tokens: 30 });
  await leaveStep(executionId, { agent_id: 'first', status: 'running', tokens: 0 });
  return executionId;
}

async function leaveStep(
  executionId: string,
  { agent_id, status, tokens }: { agent_id: string; status: string; tokens: number },
): Promise<void> {
  await api.database.query(
    `INSERT INTO step (step_id, execution_id, agent_id, status, attempt, output, input_tokens, output_tokens, started_at, finished_at)
     VALUES ($1, $2, $3, $4, 1, '"said"', $5, 12, now(), CASE WHEN $4 <> 'running' THEN now() END)`,
    [randomUUID(), executionId, agent_id, status, tokens],
  );
}

async function ended(executionId: string): Promise<Execution> {
  return until(async () => {
    const { body } = await studio.json<Execution>(`/api/executions/${executionId}`);
    return body.status === 'queued' || body.status === 'running' ? undefined : body;
  }, 60_000);
}

async function statesOfSteps(executionId: string): Promise<Record<string, string>> {
  const { body } = await studio.json<{
    items: { agent_id: string; status: string; finished_at?: string }[];
  }>(`/api/executions/${executionId}/steps`);
  expect(body.items.every(({ finished_at }) => finished_at !== undefined)).toBe(true);
  return Object.fromEntries(body.items.map(({ agent_id, status }) => [agent_id, status]));
}

/** What is promised of an execution that is not run again: its text, its usage, its steps, and a stream that takes nothing back. */
async function expectNothingLost(executionId: string, end: Partial<Execution>): Promise<void> {
  expect(await ended(executionId)).toMatchObject({
    ...end,
    response: 'First: 🦜 \n\nSecond speaks.',
    usage: { input_tokens: 30, output_tokens: 24 },
  });
  expect(await statesOfSteps(executionId)).toEqual({ helper: 'completed', first: 'cancelled' });
  const frames = await (await studio.follow(executionId)).frames();
  expect(frames.map(({ chunk }) => chunk.status).filter(Boolean)).toEqual(['started', end.status]);
  expect(textOf(frames, 'second')).toBe('Second speaks.');
}

it('a cancelled execution whose worker died keeps its text, its usage, and no step that runs', async () => {
  const executionId = await acceptAndDie();
  const cancelled = await studio.json(`/api/executions/${executionId}/cancel`, { method: 'POST' });
  expect(cancelled.status).toBe(202);
  await startWorker();
  await expectNothingLost(executionId, { status: 'cancelled' });
});

it('an execution that is over its time limit when it is taken over keeps what was said', async () => {
  const executionId = await acceptAndDie();
  await api.database.query(
    "UPDATE execution SET started_at = now() - interval '1 day' WHERE execution_id = $1",
    [executionId],
  );
  await startWorker();
  await expectNothingLost(executionId, {
    status: 'error',
    error: { code: 'timeout' },
  });
});

it('an execution that can not be run by this server keeps what was said by another one', async () => {
  const executionId = await acceptAndDie();
  await api.database.query(
    `UPDATE deployment_revision SET configuration = jsonb_set(configuration::jsonb, '{agents,0,config,model}', '"gone/model"')::json
      WHERE revision_id = (SELECT revision_id FROM execution WHERE execution_id = $1)`,
    [executionId],
  );
  await startWorker();
  await expectNothingLost(executionId, {
    status: 'error',
    error: { code: 'workflow_invalid' },
  });
  deployment = await studio.deploy(definition);
});

it('what was taken back by a restart is not in the text', async () => {
  const executionId = await acceptAndDie();
  const restarted = {
    type: 'status',
    status: 'restarted',
    sequence: 5,
    agent_id: 'second',
    discard_after: 1,
  };
  const again = { type: 'content', data: 'Once more', sequence: 6, agent_id: 'second' };
  await api.database.query('INSERT INTO execution_chunk VALUES ($1, 5, 6, $2)', [
    executionId,
    [restarted, again].map((chunk) => JSON.stringify(chunk)).join('\n'),
  ]);
  await studio.json(`/api/executions/${executionId}/cancel`, { method: 'POST' });
  await startWorker();
  expect(await ended(executionId)).toMatchObject({
    status: 'cancelled',
    response: 'First: 🦜 \n\nOnce more',
  });
});

it('a step that an earlier build left running is closed when a worker starts', async () => {
  const executionId = await accept();
  await studio.json(`/api/executions/${executionId}/cancel`, { method: 'POST' });
  expect(await ended(executionId)).toMatchObject({ status: 'cancelled', response: '' });
  await leaveStep(executionId, { agent_id: 'first', status: 'running', tokens: 0 });
  await startWorker();
  await until(async () => {
    const { body } = await studio.json<{ items: { status: string }[] }>(
      `/api/executions/${executionId}/steps`,
    );
    return body.items.every(({ status }) => status === 'cancelled') || undefined;
  }, 60_000);
});

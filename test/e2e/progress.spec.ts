import { describe, expect, it } from '@jest/globals';
import type { StepProgress } from '../../src/event-log/chunk.js';
import { faultsOfStream, until } from '../support/studio.js';
import { chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import { withStudio } from '../support/with-studio.js';

interface Progress {
  status: string;
  completed_steps: number;
  total_steps: number;
  progress: number;
  running_agents: string[];
}

/** Lets an agent's model come to its end, by the model's name. */
const finish = new Map<string, () => void>();
const server = withStudio({
  upstream: (response, request) => {
    writeStream(response, chatDelta('text'));
    finish.set(String(request.body.model), () => {
      writeStream(response, chatEnd());
      response.end();
    });
  },
});
const { studio } = server;

const agent = (agent_id: string) => ({
  agent_id,
  agent_type: 'llm',
  config: { model: `upstream/${agent_id}`, max_retries: 0 },
});
const link = (source_agent_id: string, target_agent_id: string, fields: object = {}) => ({
  source_agent_id,
  target_agent_id,
  ...fields,
});

/** `split` feeds three parallel agents; `never` and what only it feeds are skipped; `join` waits for those that ran. */
const graph = {
  agents: ['split', 'left', 'right', 'never', 'after_never', 'join'].map(agent),
  connections: [
    link('split', 'left'),
    link('split', 'right'),
    link('split', 'never', { connection_type: 'conditional', conditions: { expression: 'false' } }),
    link('never', 'after_never'),
    link('after_never', 'join'),
    link('left', 'join'),
    link('right', 'join'),
  ],
};

const progressOf = async (id: string) => (await studio.json<Progress>(`/api/executions/${id}/progress`)).body;

async function finishAgent(name: string): Promise<void> {
  (await until(() => finish.get(name)))();
  finish.delete(name);
}

describe('progress', () => {
  it('counts parallel and skipped agents rightly at every moment, in the route and in the stream', async () => {
    const deployment = await studio.deploy(graph);
    const stream = await studio.stream({ deployment_name: deployment, query: 'x', include: ['progress'] });
    const id = stream.executionId;
    const read = stream.frames();
    const reached = (completed_steps: number, running_agents: string[]) =>
      until(async () => {
        const state = await progressOf(id);
        return state.completed_steps === completed_steps &&
          state.running_agents.toSorted().join() === running_agents.join()
          ? state
          : undefined;
      });

    expect(await reached(0, ['split'])).toMatchObject({ status: 'running', total_steps: 6, progress: 0 });
    await finishAgent('split');
    // The two that are skipped count as soon as it is known that they don't run.
    expect(await reached(3, ['left', 'right'])).toMatchObject({ progress: 0.5 });
    await finishAgent('right');
    await reached(4, ['left']);
    await finishAgent('left');
    await reached(5, ['join']);
    const steps = await studio.json<{ items: { agent_id: string; status: string }[] }>(
      `/api/executions/${id}/steps`,
    );
    expect(Object.fromEntries(steps.body.items.map(({ agent_id, status }) => [agent_id, status]))).toEqual({
      split: 'completed',
      left: 'completed',
      right: 'completed',
      never: 'skipped',
      after_never: 'skipped',
      join: 'running',
    });
    await finishAgent('join');
    const frames = await read;
    expect(await reached(6, [])).toMatchObject({ status: 'completed', progress: 1 });

    expect(faultsOfStream(frames, id)).toEqual([]);
    const told = frames.flatMap(({ chunk }) =>
      typeof chunk.data === 'object' ? [chunk.data as StepProgress] : [],
    );
    expect(told.map(({ total_steps }) => total_steps)).toEqual(told.map(() => 6));
    const ends = told.filter(({ status }) => status !== 'running');
    expect(ends.map(({ completed_steps }) => completed_steps)).toEqual([1, 2, 3, 4, 5, 6]);
    expect(new Set(ends.map(({ agent_id }) => agent_id)).size).toBe(6);
    expect(
      told
        .filter(({ status }) => status === 'running')
        .map(({ agent_id }) => agent_id)
        .toSorted(),
    ).toEqual(['join', 'left', 'right', 'split']);
    const counts = told.map(({ completed_steps }) => completed_steps);
    expect(counts).toEqual(counts.toSorted((one, other) => one - other));
    expect(told.at(-1)).toMatchObject({ completed_steps: 6, progress: 1 });
  });

  it('of a cancelled execution counts the steps that were reached, and none as running', async () => {
    const deployment = await studio.deploy(graph);
    const stream = await studio.stream({ deployment_name: deployment, query: 'x' });
    await finishAgent('split');
    await until(() => (finish.has('left') && finish.has('right')) || undefined);
    await studio.json(`/api/executions/${stream.executionId}/cancel`, { method: 'POST' });
    const state = await progressOf(stream.executionId);
    expect(state).toMatchObject({ status: 'cancelled', total_steps: 6, running_agents: [] });
    expect(state.completed_steps).toBeLessThan(6);
  });

  it('can be read of an execution whose provider is gone', async () => {
    const deployment = await studio.deploy(graph);
    const { body } = await studio.json<{ execution_id: string }>('/api/workflows/execute/async', {
      method: 'POST',
      body: { deployment_name: deployment, query: 'x' },
    });
    const without = await server.startAnother({ ROLE: 'api', MODEL_PROVIDERS: '{}' });
    try {
      const answer = await without.studio.json<Progress>(`/api/executions/${body.execution_id}/progress`);
      expect(answer).toMatchObject({ status: 200, body: { total_steps: 6 } });
    } finally {
      await without.close();
      await studio.json(`/api/executions/${body.execution_id}/cancel`, { method: 'POST' });
    }
  });
});

import { expect, it } from '@jest/globals';
import { echo, textOf } from '../support/studio.js';
import { withStudio } from '../support/with-studio.js';

const { studio } = withStudio({ env: { MAX_AGENT_OUTPUT: '1000', MAX_EXECUTION_OUTPUT: '1500' } });

interface Ended {
  status: string;
  response: string;
}

const refused = async (limit: string) => {
  const text = await (await fetch(`${studio.url}/metrics`)).text();
  return Number(
    new RegExp(`^agent_studio_refused_outputs_total\\{limit="${limit}"\\} (\\S+)$`, 'm').exec(text)?.[1],
  );
};

it('ends the execution whose agent says too much with a code, keeps its text so far, and counts it', async () => {
  const deployment_name = await studio.deploy(echo());
  const query = 'word '.repeat(250);
  const stream = await studio.stream({ deployment_name, query });
  const frames = await stream.frames();
  expect(frames.at(-1)?.chunk).toMatchObject({ status: 'error', code: 'output_too_large' });
  const { body } = await studio.json<Ended>(`/api/executions/${stream.executionId}`);
  expect(body.status).toBe('error');
  expect(body.response).toBe(textOf(frames));
  expect(body.response.length).toBeLessThanOrEqual(1000);
  expect(body.response.length).toBeGreaterThan(500);
  expect(await refused('agent')).toBe(1);
});

it('ends the execution whose agents say too much together', async () => {
  const agents = [1, 2].map((number) => ({
    agent_id: `a${number}`,
    agent_type: 'template',
    config: { template: 'x'.repeat(800) },
  }));
  const deployment_name = await studio.deploy({ agents });
  expect((await studio.execute({ deployment_name, query: 'x' })).body).toMatchObject({
    code: 'output_too_large',
  });
  expect(await refused('execution')).toBe(1);
});

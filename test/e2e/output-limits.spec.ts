import { expect, it } from '@jest/globals';
import { echo, textOf } from '../support/studio.js';
import { chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import { withStudio } from '../support/with-studio.js';

/** What an integer column holds at most: two agents that report it overflow their execution's sum. */
const MOST_TOKENS = 2 ** 31 - 1;
const INNOCENTS = 20;

const { studio } = withStudio({
  upstream: (response) => {
    const usage = { prompt_tokens: MOST_TOKENS, completion_tokens: MOST_TOKENS, total_tokens: MOST_TOKENS };
    writeStream(response, chatDelta('all'), chatEnd(usage));
    response.end();
  },
  env: { MAX_AGENT_OUTPUT: '2000', MAX_EXECUTION_OUTPUT: '2500' },
});

interface Ended {
  status: string;
  response: string;
  usage: { input_tokens: number; output_tokens: number };
}

const refused = async (limit: string) => {
  const text = await (await fetch(`${studio.url}/metrics`)).text();
  return Number(
    new RegExp(`^agent_studio_refused_outputs_total\\{limit="${limit}"\\} (\\S+)$`, 'm').exec(text)?.[1],
  );
};

it('ends the execution whose agent says too much with a code, keeps its text so far, and counts it', async () => {
  const deployment_name = await studio.deploy(echo());
  const query = `${'w'.repeat(99)} `.repeat(20);
  const stream = await studio.stream({ deployment_name, query });
  const frames = await stream.frames();
  expect(frames.at(-1)?.chunk).toMatchObject({ status: 'error', code: 'output_too_large' });
  const { body } = await studio.json<Ended>(`/api/executions/${stream.executionId}`);
  expect(body.status).toBe('error');
  expect(body.response).toBe(textOf(frames));
  expect(body.response.length).toBeLessThanOrEqual(2000);
  expect(body.response.length).toBeGreaterThan(500);
  expect(await refused('agent')).toBe(1);
});

it('counts what each piece takes besides its characters', async () => {
  const deployment_name = await studio.deploy(echo());
  const stream = await studio.stream({ deployment_name, query: 'w '.repeat(100) });
  expect((await stream.frames()).at(-1)?.chunk).toMatchObject({ code: 'output_too_large' });
  expect(await refused('agent')).toBe(2);
});

it('ends the execution whose agents say too much together', async () => {
  const agents = [1, 2].map((number) => ({
    agent_id: `a${number}`,
    agent_type: 'template',
    config: { template: 'x'.repeat(1300) },
  }));
  const deployment_name = await studio.deploy({ agents });
  expect((await studio.execute({ deployment_name, query: 'x' })).body).toMatchObject({
    code: 'output_too_large',
  });
  expect(await refused('execution')).toBe(1);
});

it.each([
  ['of text and values alone', '{{ variables.x }}'.repeat(60)],
  ['with a filter, in a thread', '{{ variables.x | upcase }}'.repeat(60)],
])('ends the execution whose template makes more than a text may be: %s', async (_kind, template) => {
  const deployment_name = await studio.deploy(
    { agents: [{ agent_id: 'a', agent_type: 'template', config: { template } }] },
    { variables: { x: 'x'.repeat(100_000) } },
  );
  const { status, body } = await studio.execute<{ code: string }>({ deployment_name, query: 'x' });
  expect([status, body.code]).toEqual([502, 'output_too_large']);
});

it('the tokens of an execution stop at the most that is kept, and whoever ends beside it ends as well', async () => {
  const agents = ['a', 'b'].map((agent_id) => ({
    agent_id,
    agent_type: 'llm',
    config: { model: 'upstream/any' },
  }));
  const boastful = await studio.deploy({ agents });
  const innocent = await studio.deploy(echo());
  const run = (deployment_name: string) => studio.execute<Ended>({ deployment_name, query: 'x' });
  const all = await Promise.all([run(boastful), ...Array.from({ length: INNOCENTS }, () => run(innocent))]);

  expect(all.map(({ status, body }) => [status, body.status])).toEqual(all.map(() => [200, 'success']));
  const most = { input_tokens: MOST_TOKENS, output_tokens: MOST_TOKENS };
  expect(all[0]?.body.usage).toMatchObject(most);
  // The sums of a deployment have room for more than one such execution.
  await run(boastful);
  const statistics = await studio.json<Ended>(`/api/deployments/${boastful}/statistics`);
  const twice = { input_tokens: 2 * MOST_TOKENS, output_tokens: 2 * MOST_TOKENS };
  expect(statistics).toMatchObject({ status: 200, body: { success_count: 2, usage: twice } });
});

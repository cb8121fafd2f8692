import { expect, it } from '@jest/globals';
import { echo } from '../support/studio.js';
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
});

interface Ended {
  status: string;
  usage: { input_tokens: number; output_tokens: number };
}

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

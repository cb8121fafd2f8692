import type { ServerResponse } from 'node:http';
import { beforeEach, describe, expect, it } from '@jest/globals';
import { faultsOfStream, until, upstreamAgent } from '../support/studio.js';
import type { Studio } from '../support/studio.js';
import { chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import type { UpstreamAnswer } from '../support/upstream.js';
import { withStudio } from '../support/with-studio.js';

interface ExecutionBody {
  execution_id: string;
  status: string;
}

/** Calls of the model that wait for their answer, by their query. */
let calls: { query: string; response: ServerResponse }[] = [];
beforeEach(() => {
  calls = [];
});

const upstream: UpstreamAnswer = (response, { query }) => {
  writeStream(response, chatDelta('begun '));
  calls.push({ query, response });
};

const accept = async (studio: Studio, deployment_name: string, query: string) => {
  const { status, body } = await studio.json<ExecutionBody>('/api/workflows/execute/async', {
    method: 'POST',
    body: { deployment_name, query },
  });
  expect(status).toBe(202);
  return body.execution_id;
};

/** The model ends the call of this query, once it has got it. */
async function answer(query: string): Promise<void> {
  const call = await until(() => calls.find((one) => one.query === query));
  writeStream(call.response, chatDelta('and done'), chatEnd());
  call.response.end();
}

const untilCalled = (queries: string[]) =>
  until(() => calls.length >= queries.length).then(() =>
    expect(calls.map(({ query }) => query)).toEqual(queries),
  );

describe('max_concurrency', () => {
  const system = withStudio({ upstream, others: { second: {} } });
  const studios = [system.studio, system.others.second.studio];
  /** One of the two, in turn. */
  const at = (index: number) => studios[index % 2] as Studio;

  it('one at a time: they run in the order in which two processes accepted them, and another deployment is not held up', async () => {
    const limited = await at(0).deploy(upstreamAgent(), { max_concurrency: 1 });
    const free = await at(0).deploy(upstreamAgent());
    const queries = Array.from({ length: 6 }, (_, index) => `limited ${index}`);
    const ids: string[] = [];
    for (const [index, query] of queries.entries()) ids.push(await accept(at(index), limited, query));
    await untilCalled(['limited 0']);
    const waiting = await at(1).json<ExecutionBody>(`/api/executions/${ids[1]}`);
    expect(waiting.body.status).toBe('queued');
    await accept(at(1), free, 'free');
    await until(() => calls.some(({ query }) => query === 'free'));

    for (const [index, query] of queries.entries()) {
      await answer(query);
      await until(() => calls.length === Math.min(index + 3, 7));
    }
    expect(calls.map(({ query }) => query).filter((query) => query !== 'free')).toEqual(queries);
    for (const id of ids) {
      const frames = await (await at(0).follow(id)).frames();
      expect(faultsOfStream(frames, id)).toEqual([]);
      expect(frames.at(-1)?.chunk.status).toBe('completed');
    }
  });

  it('cancelling a waiting one changes nothing for the others, and cancelling a running one lets the next one in', async () => {
    const limited = await at(0).deploy(upstreamAgent(), { max_concurrency: 2 });
    const ids: string[] = [];
    for (let index = 0; index < 5; index++) ids.push(await accept(at(index), limited, `${index}`));
    await until(() => calls.length === 2);
    const cancel = (id = '') => at(1).json<ExecutionBody>(`/api/executions/${id}/cancel`, { method: 'POST' });
    expect((await cancel(ids[2])).body.status).toBe('cancelled');
    expect((await cancel(ids[0])).status).toBe(202);
    await until(() => calls.length === 3);
    expect(calls.map(({ query }) => query).toSorted()).toEqual(['0', '1', '3']);
    await answer('1');
    await answer('3');
    await answer('4');
  });

  it('more are let in when the deployment gets a higher limit, and all of them when it is deleted', async () => {
    const { studio } = system;
    const name = await studio.deploy(upstreamAgent(), { max_concurrency: 1 });
    for (let index = 0; index < 6; index++) await accept(at(index), name, `${index}`);
    await untilCalled(['0']);
    const { body } = await studio.json<{ workflow_id: string }>(`/api/deployments/${name}`);
    await studio.json(`/api/workflows/deployments/${name}/stop`, { method: 'POST' });
    await studio.json(`/api/workflows/${body.workflow_id}/deploy`, {
      method: 'POST',
      body: { deployment_name: name, runtime_config: { max_concurrency: 3 } },
    });
    await until(() => calls.length === 3);
    await studio.json(`/api/workflows/deployments/${name}`, { method: 'DELETE' });
    await until(() => calls.length === 6);
    for (let index = 0; index < 6; index++) await answer(`${index}`);
  });

  it.each([0, 1.5, -1, '2', 100_001])('%p is refused', async (max_concurrency) => {
    const { studio } = system;
    const failure = await studio.deploy(upstreamAgent(), { max_concurrency }).catch((error: Error) => error);
    expect(String(failure)).toContain('/runtime_config/max_concurrency');
  });
});

describe('a queue that is full', () => {
  const accepting = withStudio({ upstream, env: { ROLE: 'api', MAX_QUEUED: '3' } });
  const { studio } = accepting;

  it('refuses what is new with 429, loses nothing, and answers repeated requests', async () => {
    const deployment = await studio.deploy(upstreamAgent());
    const request = (route: string, query: string, key?: string) =>
      studio.json<{ code: string; execution_id: string }>(`/api/workflows/execute${route}`, {
        method: 'POST',
        body: { deployment_name: deployment, query },
        headers: key === undefined ? {} : { 'Idempotency-Key': key },
      });
    const first = await request('/async', '0', 'the key');
    for (const query of ['1', '2']) await accept(studio, deployment, query);
    for (const route of ['', '/async', '/stream']) {
      const { status, body, headers } = await request(route, 'too many');
      expect([status, body.code, headers.get('retry-after')]).toEqual([429, 'queue_full', '5']);
    }
    expect((await request('/async', '0', 'the key')).body.execution_id).toBe(first.body.execution_id);

    const worker = await accepting.startAnother({ ROLE: 'worker' });
    try {
      for (const query of ['0', '1', '2']) await answer(query);
      const id = await accept(studio, deployment, '3');
      await answer('3');
      const frames = await (await studio.follow(id)).frames();
      expect(frames.at(-1)?.chunk.status).toBe('completed');
      const rows = await accepting.database.query("SELECT 1 FROM execution WHERE status = 'completed'");
      expect(rows).toHaveLength(4);
    } finally {
      await worker.close();
    }
  });
});

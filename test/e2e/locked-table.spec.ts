import { expect } from '@jest/globals';
import { itInFull } from '../support/effort.js';
import { until, upstreamAgent } from '../support/studio.js';
import { chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import { withStudio } from '../support/with-studio.js';
import { Yardstick } from '../support/yardstick.js';

const REFUSED = 200;
const LATE = 20;
const SLOTS = 10;
/** A slot whose claim failed pauses for a second; then it finds in 0.3 s that there is no such execution. */
const AFTER_MS = 2000;

const system = withStudio({
  upstream: (response, { query }) => {
    writeStream(response, chatDelta(query), chatEnd());
    response.end();
  },
  env: {
    ROLE: 'api',
    DATABASE_TIMEOUT_MS: '300',
    DATABASE_POOL_SIZE: '50',
    WORKER_CONCURRENCY: String(SLOTS),
    LOG_LEVEL: 'fatal',
  },
  others: { worker: { ROLE: 'worker' } },
});
const { studio, database } = system;

interface Answer {
  query: string;
  status: number;
  body: { execution_id: string; code: string };
  headers: Headers;
}

function ask(deployment_name: string, count: number, name: string): Promise<Answer[]> {
  const one = async (query: string) => {
    const request = { method: 'POST', body: { deployment_name, query } };
    return { query, ...(await studio.json<Answer['body']>('/api/workflows/execute/async', request)) };
  };
  return Promise.all(Array.from({ length: count }, (_, index) => one(`${name} ${index}`)));
}

const jobs = async () => (await database.query('SELECT 1 FROM bullmq.job')).length;

async function msOf(deployment: string, query: string): Promise<number> {
  const begun = performance.now();
  const { status } = await studio.execute({ deployment_name: deployment, query });
  expect(status).toBe(200);
  return performance.now() - begun;
}

itInFull(
  'executions that a lock keeps from being committed leave nothing in the queue, and no slot that waits for them',
  async () => {
    const deployment = await studio.deploy(upstreamAgent());
    await msOf(deployment, 'first');
    const yardstick = await Yardstick.lay();
    const before = await msOf(deployment, 'before');
    let answers: Answer[] = [];
    let late: Promise<Answer[]> | undefined;
    await database.whileLocked('execution', 'ACCESS EXCLUSIVE', async () => {
      answers = await ask(deployment, REFUSED, 'refused');
      // Only what workers have already is left.
      await until(async () => (await jobs()) <= SLOTS, 10_000);
      late = ask(deployment, LATE, 'late');
      await until(async () => (await jobs()) > SLOTS);
    });
    answers.push(...((await late) ?? []));
    const after = await msOf(deployment, 'after');
    await yardstick.expectAtMost(after - before, AFTER_MS, 'what is asked for after the lock');
    for (const { status, body, headers } of answers) {
      if (status === 202) continue;
      expect([status, body.code]).toEqual([503, 'unavailable']);
      expect(Number(headers.get('retry-after'))).toBeGreaterThan(0);
    }
    await until(async () => (await jobs()) === 0);
    const accepted = answers.filter(({ status }) => status === 202).map(({ query }) => query);
    expect(accepted.length).toBeGreaterThan(0);
    const asked = system.upstream.requests.map(({ query }) => query);
    expect(asked.filter((query) => /^(refused|late)/.test(query)).toSorted()).toEqual(accepted.toSorted());
  },
);

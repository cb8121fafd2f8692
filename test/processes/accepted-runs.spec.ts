import { afterAll, beforeAll, expect, it } from '@jest/globals';
import { createTestDatabase } from '../support/database.js';
import type { TestDatabase } from '../support/database.js';
import { ServerProcess } from '../support/studio-process.js';
import { Studio, faultsOfStream, textOf, until, upstreamAgent } from '../support/studio.js';
import { Upstream, chatDelta, chatEnd, writeStream } from '../support/upstream.js';

const RUNS_A_ROUND = 5;
/** An execution that the queue has lost is found by a sweep, which takes place every ten seconds. */
const RECOVERED_MS = 60_000;

/** When the server is killed, other than right after its last 202. */
type Moment =
  /** No worker is in the process, so no step can have begun. */
  | 'no worker'
  /** The worker of the process may have taken any of them already, or be about to. */
  | 'racing the worker'
  /** Accepted, and not in the queue: nobody but the sweep can know of it. */
  | 'not in the queue';
const rounds: Moment[] = ['no worker', ...Array<Moment>(2).fill('racing the worker'), 'not in the queue'];

let upstream: Upstream;
let database: TestDatabase;
const servers: ServerProcess[] = [];

beforeAll(async () => {
  upstream = await Upstream.start((response, { body }) => {
    const query = (body.messages as { content: string }[]).at(-1)?.content ?? '';
    writeStream(response, chatDelta('answer to '), chatDelta(query), chatEnd());
    response.end();
  });
  database = await createTestDatabase();
});
afterAll(async () => {
  await Promise.all(servers.map((server) => server.stop('SIGKILL')));
  await database.drop();
  await upstream.stop();
});

async function startServer(role = 'all'): Promise<ServerProcess> {
  const provider = { type: 'openai-compatible', base_url: upstream.url };
  const server = await ServerProcess.start({
    DATABASE_URL: database.url,
    MODEL_PROVIDERS: JSON.stringify({ upstream: provider }),
    ROLE: role,
    JOB_LOCK_MS: '1000',
  });
  servers.push(server);
  return server;
}

/** Starts a server and kills it as soon as it has said of some executions that it accepted them; answers with their ids. */
async function acceptAndDie(deployment: string, { round, moment }: { round: number; moment: Moment }) {
  const server = await startServer(moment === 'no worker' ? 'api' : 'all');
  const studio = new Studio(server.url);
  const accept = async (run: number) => {
    const { status, body } = await studio.json<{ execution_id: string }>('/api/workflows/execute/async', {
      method: 'POST',
      body: { deployment_name: deployment, query: `${round}.${run}` },
    });
    expect(status).toBe(202);
    return body.execution_id;
  };
  const die = async () => {
    const accepted = await Promise.all(Array.from({ length: RUNS_A_ROUND }, (_, run) => accept(run)));
    await server.stop('SIGKILL');
    return accepted;
  };
  if (moment !== 'not in the queue') return die();
  let accepted: string[] = [];
  await database.whileLocked('bullmq.job', 'SHARE', async () => {
    accepted = await die();
    // PostgreSQL does not notice that a client has died while its statement waits, and would carry it out.
    await database.query(
      `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock'`,
    );
  });
  const queued = await database.query('SELECT 1 FROM bullmq.job WHERE id = ANY ($1)', [accepted]);
  expect(queued).toHaveLength(0);
  return accepted;
}

it('an execution that was accepted runs, whenever the server is killed after that', async () => {
  const first = await startServer('api');
  const deployment = await new Studio(first.url).deploy(upstreamAgent());
  await first.stop();
  const accepted: string[] = [];
  for (const [round, moment] of rounds.entries()) {
    const before = upstream.requests.length;
    accepted.push(...(await acceptAndDie(deployment, { round, moment })));
    if (moment === 'no worker') expect(upstream.requests).toHaveLength(before);
  }
  expect(new Set(accepted).size).toBe(rounds.length * RUNS_A_ROUND);

  const last = await startServer();
  await until(async () => {
    const unfinished = await database.query("SELECT 1 FROM execution WHERE status IN ('queued', 'running')");
    return unfinished.length === 0 || undefined;
  }, RECOVERED_MS);
  const studio = new Studio(last.url);
  for (const [index, executionId] of accepted.entries()) {
    const answer = `answer to ${Math.floor(index / RUNS_A_ROUND)}.${index % RUNS_A_ROUND}`;
    const { body } = await studio.json(`/api/executions/${executionId}`);
    expect(body).toMatchObject({ status: 'completed', response: answer });
    const frames = await (await studio.follow(executionId)).frames();
    expect(faultsOfStream(frames, executionId)).toEqual([]);
    const restarted = frames.findLastIndex(({ chunk }) => chunk.status === 'restarted');
    expect(textOf(frames.slice(restarted + 1))).toBe(answer);
  }
}, 180_000);

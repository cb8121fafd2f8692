import { afterAll, afterEach, beforeAll, expect, it } from '@jest/globals';
import { Client } from 'pg';
import { SmallNotificationQueue } from '../support/small-notification-queue.js';
import { ServerProcess } from '../support/studio-process.js';
import { Studio, faultsOfStream, until, untilPasses, upstreamAgent } from '../support/studio.js';
import { Upstream, chatDelta, chatEnd, writeStream } from '../support/upstream.js';

const LOG = 'agent_studio_log';
/** `tcp_user_timeout` is 30 s, and the system looks at it now and then. */
const CUT_OFF_MS = 90_000;
const USAGE = 'agent_studio_notification_queue_usage';

let queue: SmallNotificationQueue;
let upstream: Upstream;
const servers: ServerProcess[] = [];

beforeAll(async () => {
  queue = await SmallNotificationQueue.start();
  upstream = await Upstream.start((response) => {
    writeStream(response, chatDelta('begin '), chatDelta('end'), chatEnd());
    response.end();
  });
});
afterEach(async () => {
  await Promise.all(servers.splice(0).map((server) => server.stop('SIGKILL')));
});
afterAll(async () => {
  await upstream?.stop();
  await queue?.stop();
});

async function start(): Promise<ServerProcess> {
  const server = await ServerProcess.start({
    DATABASE_URL: queue.url,
    MODEL_PROVIDERS: JSON.stringify({ upstream: { type: 'openai-compatible', base_url: upstream.url } }),
    NOTIFICATION_QUEUE_WATCH_MS: '1000',
  });
  servers.push(server);
  return server;
}

it('a full queue that somebody else holds up is said by the probe and the metric, until there is room again', async () => {
  const worker = new Studio((await start()).url);
  const deployment_name = await worker.deploy(upstreamAgent());
  const ready = () =>
    worker.json<{ detail: string; info: { database: { notification_queue_usage: number } } }>(
      '/health/ready',
    );
  const before = await ready();
  expect(before).toMatchObject({
    status: 200,
    body: { info: { database: { notification_queue_usage: 0 } } },
  });

  const foreign = new Client({ connectionString: queue.url });
  await foreign.connect();
  await foreign.query('LISTEN foreign_channel');
  await foreign.query('BEGIN');
  await foreign.query('SELECT 1');
  try {
    await expect(queue.fill(1, [LOG])).rejects.toMatchObject({ code: '54000', routine: 'PreCommit_Notify' });
    await until(async () => (await ready()).status === 503);
    expect((await ready()).body.detail).toContain("PostgreSQL's queue of notifications is full");
    expect(await worker.metric(USAGE)).toBeGreaterThanOrEqual(0.99);
    // What is accepted meanwhile waits.
    const accepted = await worker.json<{ execution_id: string }>('/api/workflows/execute/async', {
      method: 'POST',
      body: { deployment_name, query: 'meanwhile' },
    });
    expect(accepted.status).toBe(202);
    expect(await foreign.query('SELECT 1')).toMatchObject({ rowCount: 1 }); // nobody has ended it
    await foreign.query('COMMIT');
    await until(async () => (await ready()).status === 200);
    await until(async () => (await worker.metric(USAGE)) < 0.5);
    await untilPasses(async () => {
      const { body } = await worker.json(`/api/executions/${accepted.body.execution_id}`);
      expect(body).toMatchObject({ status: 'completed', response: 'begin end' });
    });
  } finally {
    await foreign.end();
  }
}, 120_000);

it('a process that is stopped is cut off before the queue is full, and is there again when it goes on', async () => {
  const studio = new Studio((await start()).url);
  const stopped = await start();
  const deployment_name = await studio.deploy(upstreamAgent());
  const listeners = () =>
    queue.query("SELECT 1 FROM pg_stat_activity WHERE application_name = 'agent-studio/notifications'");
  const before = await listeners();
  stopped.process.kill('SIGSTOP');
  try {
    // More than its socket takes, so that its connection keeps what was sent.
    await queue.fill(0.5, [LOG]);
    await until(async () => (await listeners()).length < before.length, CUT_OFF_MS);
    await until(async () => (await queue.usage()) < 0.1);
    expect((await studio.execute({ deployment_name, query: 'meanwhile' })).status).toBe(200);
  } finally {
    stopped.process.kill('SIGCONT');
  }
  await until(async () => (await listeners()).length === before.length);
  const { executionId } = await studio.stream({ deployment_name, query: 'after it' });
  const frames = await (await new Studio(stopped.url).follow(executionId)).frames();
  expect(faultsOfStream(frames, executionId)).toEqual([]);
}, 180_000);

import { randomUUID } from 'node:crypto';
import { expect, it } from '@jest/globals';
import { ExecutionQueue } from '../../src/queue/execution-queue.js';
import { itInFull, rounds } from '../support/effort.js';
import { echo, faultsOfStream, until, upstreamAgent } from '../support/studio.js';
import { chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import { withStudio } from '../support/with-studio.js';

const SLOTS = 10;

let letGo: () => void = () => undefined;
let held = new Promise<void>(() => undefined);
const hold = () => void (held = new Promise((resolve) => (letGo = resolve)));

const system = withStudio({
  upstream: async (response) => {
    writeStream(response, chatDelta('begun '));
    await held;
    writeStream(response, chatDelta('ended'), chatEnd());
    response.end();
  },
  env: { JOB_LOCK_MS: '1000', WORKER_CONCURRENCY: String(SLOTS) },
});
const { studio, database } = system;

const queue = () => system.app.get(ExecutionQueue, { strict: false });

it('jobs without an execution leave every slot at once, and the queue', async () => {
  const deployment = await studio.deploy(echo());
  await queue().add(Array.from({ length: rounds(10, 3) * SLOTS }, () => randomUUID()));
  const answer = await studio.execute({ deployment_name: deployment, query: 'x' });
  expect(answer.status).toBe(200);
  await until(async () => (await database.query('SELECT 1 FROM bullmq.job')).length === 0);
});

itInFull(
  'an execution that only waits for its model has none of its rows written, while its lease is renewed',
  async () => {
    hold();
    const deployment = await studio.deploy(upstreamAgent());
    const runs = await Promise.all(
      Array.from({ length: SLOTS }, () => studio.stream({ deployment_name: deployment, query: 'x' })),
    );
    const writes = async () => {
      const rows = await database.query<{ name: string; updates: string }>(
        `SELECT relname AS name, n_tup_upd::text AS updates FROM pg_stat_user_tables
        WHERE relname IN ('execution', 'job', 'worker_lease')`,
      );
      return Object.fromEntries(rows.map(({ name, updates }) => [name, Number(updates)]));
    };
    await until(async () => system.upstream.requests.length === SLOTS);
    // PostgreSQL counts a connection's writes a second after them.
    let before = await writes();
    await until(async () => {
      const now = await writes();
      const isQuiet = now.execution === before.execution && now.job === before.job;
      if (!isQuiet) before = now;
      return isQuiet && (now.worker_lease ?? 0) >= (before.worker_lease ?? 0) + 4;
    });
    letGo();
    for (const run of runs) expect(faultsOfStream(await run.frames(), run.executionId)).toEqual([]);
  },
);

it('a process whose lease another one took lets go of everything, takes a new one and goes on', async () => {
  hold();
  const deployment = await studio.deploy(upstreamAgent());
  const run = await studio.stream({ deployment_name: deployment, query: 'x' });
  const attempt = async () =>
    (
      await database.query<{ attempt: number; worker_id: string }>(
        'SELECT attempt, worker_id FROM execution WHERE execution_id = $1',
        [run.executionId],
      )
    )[0];
  const first = await until(async () => {
    const row = await attempt();
    return row?.attempt === 1 ? row : undefined;
  });
  await database.query('UPDATE worker_lease SET lost_at = now()');
  const second = await until(async () => {
    const row = await attempt();
    return row?.attempt === 2 ? row : undefined;
  });
  expect(second.worker_id).not.toBe(first.worker_id);
  letGo();
  const frames = await run.frames();
  expect(faultsOfStream(frames, run.executionId)).toEqual([]);
  expect(frames.at(-1)?.chunk.status).toBe('completed');
});

it('a job that a worker took which died before its claim is handed out again', async () => {
  const deployment = await studio.deploy(echo());
  let stream: Awaited<ReturnType<typeof studio.stream>> | undefined;
  // As such a worker leaves it: taken, with a lock that runs out in an hour by its own clock.
  await database.query(`
    CREATE FUNCTION taken() RETURNS trigger LANGUAGE plpgsql AS $$
      BEGIN
        NEW.state := 'active'; NEW.lock_token := 'dead:1';
        NEW.locked_until_ms := (extract(epoch FROM clock_timestamp()) * 1000)::bigint + 3600000;
        RETURN NEW;
      END $$;
    CREATE TRIGGER taken BEFORE INSERT ON bullmq.job FOR EACH ROW EXECUTE FUNCTION taken()`);
  try {
    stream = await studio.stream({ deployment_name: deployment, query: 'x' });
    await until(
      async () => (await database.query("SELECT 1 FROM bullmq.job WHERE lock_token = 'dead:1'"))[0],
    );
  } finally {
    await database.query('DROP TRIGGER taken ON bullmq.job');
  }
  expect((await stream.frames()).at(-1)?.chunk.status).toBe('completed');
});

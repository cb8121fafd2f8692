import { randomUUID } from 'node:crypto';
import type { ServerResponse } from 'node:http';
import { describe, expect, it } from '@jest/globals';
import { Client } from 'pg';
import { ExecutionQueue } from '../../src/queue/execution-queue.js';
import { itInFull, rounds } from '../support/effort.js';
import { echo, faultsOfStream, until, upstreamAgent } from '../support/studio.js';
import { chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import { withStudio } from '../support/with-studio.js';

const SLOTS = 10;
/** Executions that wait for their models. */
const WAITING = 450;
const RENEWALS = 12;
/** The tables that have rows of each execution. */
const OF_EXECUTIONS = [
  'execution',
  'execution_chunk',
  'execution_subscriber',
  'status_event',
  'step',
  'bullmq.job',
];
/** Within this time nothing is written to them any more. */
const QUIET_MS = 40_000;
const PAGE_BYTES = 8192;

let letGo: () => void = () => undefined;
let held = new Promise<void>(() => undefined);
const hold = () => void (held = new Promise((resolve) => (letGo = resolve)));

const answer = async (response: ServerResponse) => {
  writeStream(response, chatDelta('begun '));
  await held;
  writeStream(response, chatDelta('ended'), chatEnd());
  response.end();
};

const system = withStudio({
  upstream: answer,
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

it('a worker whose connections all wait for a lock keeps its lease', async () => {
  hold();
  const witness = await system.startAnother({ JOB_LOCK_MS: '1000' });
  const deployment = await studio.deploy(upstreamAgent());
  const run = await studio.stream({ deployment_name: deployment, query: 'x' });
  await run.take(2);
  const oldestLease = async () => {
    const [row] = await database.query<{ oldest: Date }>(
      'SELECT min(renewed_at) AS oldest FROM worker_lease WHERE lost_at IS NULL',
    );
    return row?.oldest.getTime() ?? NaN;
  };
  const lost = () => database.query('SELECT worker_id FROM worker_lease WHERE lost_at IS NOT NULL');
  const [before, lostBefore] = [await oldestLease(), await lost()];
  await database.whileLocked('deployment', 'ACCESS EXCLUSIVE', async () => {
    const refused = Array.from({ length: 30 }, () =>
      studio.execute({ deployment_name: deployment, query: 'x' }),
    );
    await until(async () => (await oldestLease()) > before + 3000);
    letGo();
    void Promise.allSettled(refused);
  });
  expect(await lost()).toEqual(lostBefore);
  await witness.close();
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

type Tables = Map<string, { written: number; bytes: number }>;
const writesOf = (name: string, before: Tables, now: Tables) =>
  (now.get(name)?.written ?? 0) - (before.get(name)?.written ?? 0);

describe('executions that only wait for their models, beside a snapshot that is held', () => {
  const crowd = withStudio({
    upstream: answer,
    env: { JOB_LOCK_MS: '1000', WORKER_CONCURRENCY: String(WAITING) },
  });

  /** Rows written so far, and bytes, of each table; without what a vacuum writes down about them. */
  async function tables(): Promise<Tables> {
    const rows = await crowd.database.query<{ name: string; written: string; bytes: string }>(
      `SELECT relid::regclass::text AS name, n_tup_ins + n_tup_upd + n_tup_del AS written, 
              pg_relation_size(relid) + (SELECT coalesce(sum(pg_relation_size(indexrelid)), 0) FROM pg_index WHERE indrelid = relid) AS bytes
         FROM pg_stat_user_tables`,
    );
    const figures = rows.map(({ name, written, bytes }) => ({
      name,
      written: Number(written),
      bytes: Number(bytes),
    }));
    return new Map(figures.map(({ name, ...figure }) => [name, figure]));
  }

  itInFull('have none of their rows written, while the lease of their worker is renewed', async () => {
    hold();
    const deployment = await crowd.studio.deploy(upstreamAgent());
    const runs = await Promise.all(
      Array.from({ length: WAITING }, () => crowd.studio.stream({ deployment_name: deployment, query: 'x' })),
    );
    await until(() => crowd.upstream.requests.length === WAITING);
    const snapshot = new Client({ connectionString: crowd.database.url });
    await snapshot.connect();
    try {
      await snapshot.query('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1 FROM execution LIMIT 1');
      // PostgreSQL counts a connection's writes a while after them.
      let before = await tables();
      const now = await until(async () => {
        const found = await tables();
        if (OF_EXECUTIONS.some((name) => found.get(name)?.written !== before.get(name)?.written))
          before = found;
        return writesOf('worker_lease', before, found) >= RENEWALS ? found : undefined;
      }, QUIET_MS);
      const writes = [...now.keys()].map((name) => writesOf(name, before, now));
      expect(writes.reduce((sum, count) => sum + count, 0)).toBeLessThan(3 * RENEWALS);
      const grown = [...now].map(([name, { bytes }]) => bytes - (before.get(name)?.bytes ?? 0));
      expect(Math.max(...grown)).toBeLessThanOrEqual(PAGE_BYTES);
    } finally {
      await snapshot.end();
    }
    letGo();
    for (const run of runs) expect(faultsOfStream(await run.frames(), run.executionId)).toEqual([]);
  });
});

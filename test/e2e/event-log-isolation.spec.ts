import { beforeAll, describe, expect, it } from '@jest/globals';
import { Client } from 'pg';
import { v7 as uuidv7 } from 'uuid';
import type { Step } from '../../src/database/entities/step.entity.js';
import { EventLog } from '../../src/event-log/event-log.js';
import type { LogOwner, LogWriter } from '../../src/event-log/event-log.js';
import { StepStore } from '../../src/executions/step-store.js';
import { itInFull } from '../support/effort.js';
import { withStudio } from '../support/with-studio.js';

const BYSTANDERS = 20;
const END = { status: 'completed', response: 'r', input_tokens: 1, output_tokens: 2 } as const;

const server = withStudio({ env: { ROLE: 'api', DATABASE_TIMEOUT_MS: '500' } });
let log: EventLog;

beforeAll(async () => {
  log = server.app.get(EventLog);
  // Executions whose environment says how PostgreSQL is to treat what is written of them.
  await server.database.query(`
    CREATE FUNCTION apply_treatment() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE treatment text := (SELECT environment FROM execution WHERE execution_id = NEW.execution_id);
    BEGIN
      IF treatment = 'refused' THEN RAISE EXCEPTION 'refused' USING ERRCODE = '22P02'; END IF;
      IF treatment = 'slow' THEN PERFORM pg_sleep(60); END IF;
      RETURN NEW;
    END $$`);
  for (const table of ['execution_chunk', 'step']) {
    await server.database.query(
      `CREATE TRIGGER treated BEFORE INSERT ON ${table} FOR EACH ROW EXECUTE FUNCTION apply_treatment()`,
    );
  }
});

/** A running execution whose log is empty. */
async function begin(treatment = 'production'): Promise<LogOwner> {
  const execution_id = uuidv7();
  const workflow_id = uuidv7();
  await server.database.query(
    `INSERT INTO execution (execution_id, deployment_id, deployment_name, environment, workflow_id, revision_id, status, fence, input, created_at)
     VALUES ($1, $2, 'd', $4, $3, $2, 'running', 1, '{}', now())`,
    [execution_id, uuidv7(), workflow_id, treatment],
  );
  return { execution_id, deployment_name: 'd', workflow_id, fence: 1, last_sequence: 0 };
}

const beginMany = () => Promise.all(Array.from({ length: BYSTANDERS }, () => begin()));

function say(owner: LogOwner, text = 'hello'): LogWriter {
  const writer = log.open(owner);
  writer.append({ type: 'content', data: text, agent_id: 'a' });
  return writer;
}

function stepOf({ execution_id }: LogOwner): Step {
  const now = new Date();
  return {
    step_id: uuidv7(),
    execution_id,
    agent_id: 'a',
    status: 'completed',
    attempt: 1,
    output: 'o',
    error: null,
    code: null,
    input_tokens: 0,
    output_tokens: 0,
    started_at: now,
    finished_at: now,
  };
}

async function statusOf({ execution_id }: LogOwner): Promise<string | undefined> {
  const [row] = await server.database.query<{ status: string }>(
    'SELECT status FROM execution WHERE execution_id = $1',
    [execution_id],
  );
  return row?.status;
}

/** Holds a lock on an execution's row, as a client of the database that went to lunch would, until the function is called. */
async function lock({ execution_id }: LogOwner): Promise<() => Promise<void>> {
  const client = new Client({ connectionString: server.database.url });
  await client.connect();
  await client.query('BEGIN');
  await client.query('SELECT 1 FROM execution WHERE execution_id = $1 FOR UPDATE', [execution_id]);
  return async () => {
    await client.query('ROLLBACK');
    await client.end();
  };
}

/** Whether a promise is settled, without waiting for it. */
function watch(promise: Promise<unknown>): { settled: boolean } {
  const state = { settled: false };
  promise.then(
    () => (state.settled = true),
    () => (state.settled = true),
  );
  return state;
}

describe('an execution whose row is locked', () => {
  it('does not hold up what others say, and says it once the lock is gone', async () => {
    const [culprit, others] = [await begin(), await beginMany()];
    const unlock = await lock(culprit);
    const held = say(culprit).flush();
    const state = watch(held);
    const writers = others.map((owner) => say(owner));
    for (let round = 0; round < 3; round++) {
      await Promise.all(writers.map((writer) => writer.flush()));
      writers.forEach((writer) => writer.append({ type: 'content', data: 'more', agent_id: 'a' }));
    }
    expect(state.settled).toBe(false);
    await unlock();
    await expect(held).resolves.toBe(1);
  });

  it('does not hold up the ends of others, and ends once the lock is gone', async () => {
    const [culprit, others] = [await begin(), await beginMany()];
    const unlock = await lock(culprit);
    const held = log.open(culprit).finish(END);
    const state = watch(held);
    const ends = await Promise.all(others.map((owner) => log.open(owner).finish(END)));
    expect(ends).toEqual(others.map(() => 'completed'));
    expect(state.settled).toBe(false);
    await unlock();
    await expect(held).resolves.toBe('completed');
    expect(await statusOf(culprit)).toBe('completed');
  });

  it('does not hold up the steps of others, and its own is saved once the lock is gone', async () => {
    const [culprit, others] = [await begin(), await beginMany()];
    const steps = server.app.get(StepStore);
    const unlock = await lock(culprit);
    const held = steps.save(stepOf(culprit), { fence: 1, logged: 0 });
    const state = watch(held);
    await Promise.all(others.map((owner) => steps.save(stepOf(owner), { fence: 1, logged: 0 })));
    expect(state.settled).toBe(false);
    await unlock();
    await held;
    const saved = await server.database.query('SELECT 1 FROM step WHERE execution_id = ANY ($1)', [
      [culprit, ...others].map(({ execution_id }) => execution_id),
    ]);
    expect(saved).toHaveLength(BYSTANDERS + 1);
  });
});

describe.each(['refused', 'slow'])('a row that PostgreSQL finds %s', (treatment) => {
  /** What a slow row holds up is waited for, and once is enough. */
  const also = treatment === 'slow' ? itInFull : it;

  it('keeps no other one of the same flush out of the log', async () => {
    const [culprit, others] = [await begin(treatment), await beginMany()];
    const held = say(culprit).flush();
    const state = watch(held);
    const last = await Promise.all(others.map((owner) => say(owner).flush()));
    expect(last).toEqual(others.map(() => 1));
    if (treatment === 'refused') await expect(held).rejects.toThrow('refused');
    else expect(state.settled).toBe(false);
    await stopTreating(culprit, held);
  });

  also('keeps no other execution of the same group from ending', async () => {
    const [culprit, others] = [await begin(treatment), await beginMany()];
    const held = log.open(culprit).finish(END);
    const state = watch(held);
    const ends = await Promise.all(others.map((owner) => log.open(owner).finish(END)));
    expect(ends).toEqual(others.map(() => 'completed'));
    if (treatment === 'refused') await expect(held).rejects.toThrow('refused');
    else expect(state.settled).toBe(false);
    await stopTreating(culprit, held);
  });

  also('keeps no other step of the same group from being saved', async () => {
    const [culprit, others] = [await begin(treatment), await beginMany()];
    const steps = server.app.get(StepStore);
    const held = steps.save(stepOf(culprit), { fence: 1, logged: 0 });
    const state = watch(held);
    await Promise.all(others.map((owner) => steps.save(stepOf(owner), { fence: 1, logged: 0 })));
    if (treatment === 'refused') await expect(held).rejects.toThrow('refused');
    else expect(state.settled).toBe(false);
    await stopTreating(culprit, held);
  });

  async function stopTreating({ execution_id }: LogOwner, held: Promise<unknown>): Promise<void> {
    await server.database.query(`UPDATE execution SET environment = 'production' WHERE execution_id = $1`, [
      execution_id,
    ]);
    if (treatment === 'slow') await held;
  }
});

describe('counts that overflow a column', () => {
  it('fail with their own execution only', async () => {
    const [culprit, others] = [await begin(), await beginMany()];
    const held = log.open(culprit).finish({ ...END, input_tokens: 2 ** 31 });
    watch(held);
    const ends = await Promise.all(others.map((owner) => log.open(owner).finish(END)));
    expect(ends).toEqual(others.map(() => 'completed'));
    await expect(held).rejects.toThrow('out of range');
  });
});

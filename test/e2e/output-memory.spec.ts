import type { ServerResponse } from 'node:http';
import { expect, it } from '@jest/globals';
import { echo, faultsOfStream, until } from '../support/studio.js';
import type { Studio } from '../support/studio.js';
import { chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import { withStudio } from '../support/with-studio.js';

const PIECE = 'x'.repeat(16_384);
const PIECES = 192;
const LONG = PIECE.length * PIECES;
/** What an execution may hold without asking: where nothing else may be held, this is the least. */
const SHARE = 65_536;
const LIMIT_S = 8;

/** The provider's answers by what was asked; each begins, and goes on as the test says. */
const answers = new Map<string, ServerResponse[]>();

const system = withStudio({
  upstream: (response, { body }) => {
    const [{ content: query } = { content: '' }] = body.messages as { content: string }[];
    answers.set(query, [...(answers.get(query) ?? []), response]);
    writeStream(response, chatDelta(query));
  },
  env: {
    MAX_PROCESS_OUTPUT_PERCENT: '0',
    STREAM_FLUSH_INTERVAL_MS: '0',
    SHUTDOWN_GRACE_MS: '0',
    ROLE: 'api',
  },
});
const { studio } = system;

const writer = { agent_id: 'writer', agent_type: 'llm', config: { model: 'upstream/m' } };
/** What the first agent says is a checkpoint that is longer than a share. */
const takenOver = {
  agents: [{ agent_id: 'first', agent_type: 'template', config: { template: 'y'.repeat(99_000) } }, writer],
  connections: [{ source_agent_id: 'first', target_agent_id: 'writer' }],
};

interface Ended {
  status: string;
  response: string;
}

async function begin(deployment_name: string, query: string): Promise<string> {
  const { executionId } = await studio.stream({ deployment_name, query });
  await until(() => answers.has(query));
  return executionId;
}

/** An execution whose model says 3 MiB, and then nothing more until {@link finish}. */
async function beginLong(deployment_name: string, query: string): Promise<string> {
  const executionId = await begin(deployment_name, query);
  for (let piece = 0; piece < PIECES; piece++) answers.get(query)?.[0]?.write(chatDelta(PIECE));
  return executionId;
}

const finish = (query: string) => answers.get(query)?.at(-1)?.end(chatEnd());

async function ended(executionId: string): Promise<Ended> {
  const path = `/api/executions/${executionId}`;
  await until(async () => !/queued|running/.test((await studio.json<Ended>(path)).body.status));
  return (await studio.json<Ended>(path)).body;
}

const cancel = (executionId: string) =>
  studio.json(`/api/executions/${executionId}/cancel`, { method: 'POST' });

const heldBy = (worker: Studio) => worker.metric('agent_studio_held_output_bytes');

it('lets long executions wait for each other where their process holds too much, and nobody else', async () => {
  const worker = await system.startAnother({ ROLE: 'worker' });
  const held = () => heldBy(worker.studio);
  const deployment_name = await studio.deploy({ agents: [writer] });
  const first = await beginLong(deployment_name, 'first');
  await until(async () => (await held()) > LONG);
  const before = await held();
  const second = await beginLong(deployment_name, 'second');
  const third = await beginLong(deployment_name, 'third');
  await until(async () => (await held()) > before + 2 * SHARE);

  const ordinary = await studio.execute<Ended>({ deployment_name: await studio.deploy(echo()), query: 'hi' });
  expect(ordinary.body.status).toBe('success');
  expect(await held()).toBeLessThan(before + 4 * SHARE);

  await cancel(third);
  const { status, response } = await ended(third);
  expect(status).toBe('cancelled');
  expect(response.length).toBeGreaterThan(SHARE / 2);
  expect(response.length).toBeLessThan(2 * SHARE);

  for (const query of ['second', 'first']) finish(query);
  for (const [executionId, query] of [
    [first, 'first'],
    [second, 'second'],
  ] as const)
    expect(await ended(executionId)).toMatchObject({
      status: 'completed',
      response: query + PIECE.repeat(PIECES),
    });
  await until(async () => (await held()) === 0);
  await worker.close();
});

it('an execution that was handed back waits before its checkpoints are read, and can be cancelled or run out of time', async () => {
  const leaving = await system.startAnother({
    ROLE: 'worker',
    WORKER_CONCURRENCY: '3',
    MAX_PROCESS_OUTPUT_PERCENT: '12',
  });
  const deployment = await studio.deploy(takenOver);
  const limited = await studio.deploy(takenOver, { timeout: LIMIT_S });
  const [patient, cancelled, late] = [
    await begin(deployment, 'patient'),
    await begin(deployment, 'cancelled'),
    await begin(limited, 'late'),
  ];
  const next = await system.startAnother({ ROLE: 'worker' });
  const long = await beginLong(await studio.deploy({ agents: [writer] }), 'long');
  await until(async () => (await heldBy(next.studio)) > LONG);
  await leaving.close();
  await until(async () => (await next.studio.metric('agent_studio_executions_running')) === 4);

  await cancel(cancelled);
  expect(await ended(cancelled)).toMatchObject({ status: 'cancelled', response: 'cancelled' });
  expect(await ended(late)).toMatchObject({ status: 'error', error: { code: 'timeout' }, response: 'late' });
  expect(answers.get('patient')).toHaveLength(1);
  finish('long');
  expect((await ended(long)).status).toBe('completed');
  await until(() => answers.get('patient')?.length === 2);
  finish('patient');
  expect(await ended(patient)).toMatchObject({ status: 'completed', response: 'patient' });
  const frames = await (await studio.follow(patient)).frames();
  expect(faultsOfStream(frames, patient)).toEqual([]);
  await until(async () => (await heldBy(next.studio)) === 0);
});

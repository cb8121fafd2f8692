/** Checks how a deployment is run: waiting for it, in a stream, resumed, failing, and in the background. */
import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import {
  checkChunk,
  checkFields,
  checkOrder,
  checkProblem,
  checkStreamHeaders,
  readEventsOf,
  readFrames,
  textOf,
  TIMESTAMP,
  UUID,
} from './stream-rules.mjs';
import { QUERY } from './verification.mjs';

/** @typedef {import('./verification.mjs').Verification} Verification */
/** @typedef {import('./stream-rules.mjs').Frame} Frame */

const EXECUTE_FIELDS = [
  'deployment_name',
  'workflow_id',
  'execution_id',
  'status',
  'response',
  'deployment_id',
  'usage',
  'duration_ms',
  'timestamp',
];

/** @param {Verification} verification @returns {Promise<string | undefined>} the response */
export async function checkExecute({ check, execute, name, workflow }) {
  return check('a run that is waited for answers with its whole text', async () => {
    const { status, headers, body } = await execute('');
    assert.equal(status, 200);
    checkFields(body, EXECUTE_FIELDS);
    assert.equal(body.status, 'success');
    assert.equal(body.deployment_name, name);
    assert.equal(body.workflow_id, workflow?.workflow_id);
    assert.match(body.timestamp, TIMESTAMP);
    assert.ok(body.duration_ms >= 0);
    assert.equal(headers.get('content-location'), `/api/executions/${body.execution_id}`);
    assert.ok(
      body.response.includes(QUERY),
      `the response does not hold the query as it was: ${body.response}`,
    );
    return body.response;
  });
}

/**
 * @param {Verification} verification
 * @param {string | undefined} response of the same run, waited for
 * @returns {Promise<{execution_id: string, path: string, frames: Frame[]} | undefined>} the stream
 */
export async function checkStream({ check, execute, origin, get }, response) {
  const stream = await check(
    'a streamed run answers with an uncompressed, unbuffered event stream',
    async () => {
      const answer = await execute('/stream');
      checkStreamHeaders(answer);
      const [, execution_id] =
        /^\/api\/executions\/([^/]+)$/.exec(answer.headers.get('content-location') ?? '') ?? [];
      assert.match(execution_id ?? '', UUID);
      assert.equal(answer.headers.get('location'), `/api/executions/${execution_id}/stream`);
      return { execution_id, bytes: answer.bytes, path: `/api/executions/${execution_id}` };
    },
  );
  if (!stream) return undefined;
  const { execution_id, bytes, path } = stream;
  const frames = await check('each event has an id and one line of data, ends with LF and a blank line', () =>
    readFrames(bytes),
  );
  if (!frames) return undefined;
  await check('each chunk has the documented fields and no other', () => {
    frames.forEach((frame) => checkChunk(frame.chunk, origin(execution_id)));
  });
  await check('`started` is first, one terminal chunk is last, and the numbers have no gap', () => {
    checkOrder(frames, { execution_id, end: 'completed' });
  });
  await check(
    'the chunks together are, byte for byte, the answer of the execution and of its agent',
    async () => {
      const text = textOf(frames);
      const execution = await get(path);
      assert.equal(execution.status, 'completed');
      assert.equal(text, execution.response);
      if (response) assert.equal(text, response, 'the run that was waited for answered otherwise');
      const { items } = await get(`${path}/steps`);
      assert.deepEqual(
        items.map(({ agent_id, status }) => [agent_id, status]),
        [
          ['outline', 'completed'],
          ['answer', 'completed'],
        ],
      );
      assert.equal(items[1].output, text);
      assert.deepEqual(await get(`${path}/progress`), {
        execution_id,
        status: 'completed',
        completed_steps: 2,
        total_steps: 2,
        progress: 1,
        running_agents: [],
      });
    },
  );
  return { ...stream, frames };
}

/**
 * @param {Verification} verification
 * @param {{execution_id: string, path: string, frames: Frame[]}} stream as it was received in one piece
 */
export async function checkResume({ stream, check, client }, { execution_id, frames, path }) {
  const last = frames.length;
  const follow = (headers, query = '') => stream('GET', `${path}/stream${query}`, { headers });
  const after = (sequence) => ({ 'last-event-id': `${execution_id}:${sequence}` });
  const whole = frames.map(({ id, data }) => ({ id, data }));
  await check('a stream goes on after any event, with the same bytes', async () => {
    for (const sequence of [1, 2, Math.floor(last / 2), last - 1]) {
      assert.deepEqual(readEventsOf(await follow(after(sequence))), whole.slice(sequence));
      assert.deepEqual(readEventsOf(await follow({}, `?after=${sequence}`)), whole.slice(sequence));
    }
    assert.deepEqual(readEventsOf(await follow({})), whole, 'the replay from the beginning differs');
  });
  await check('after the last event there is nothing more: 204', async () => {
    assert.equal((await follow(after(last))).status, 204);
    assert.equal((await follow({}, `?after=${last}`)).status, 204);
  });
  await check(
    'a cursor past the end, of another execution, or of no execution is refused with 400',
    async () => {
      for (const id of [`${execution_id}:${last + 1}`, `${randomUUID()}:1`, 'nonsense']) {
        const answer = await client.send('GET', `${path}/stream`, {
          headers: { 'last-event-id': id },
        });
        checkProblem(answer, 400, 'invalid_cursor');
      }
    },
  );
  await check('an execution that has ended can not be cancelled: 409', async () => {
    checkProblem(await client.send('POST', `${path}/cancel`), 409, 'execution_finished');
  });
}

/** @param {Verification} verification */
export async function checkProgressChunks({ check, execute, origin }) {
  await check('a stream holds progress where, and only where, it was asked for', async () => {
    const { headers, bytes } = await execute('/stream', { include: ['progress'] });
    const execution_id = headers.get('content-location')?.split('/').at(-1);
    const frames = readFrames(bytes);
    frames.forEach((frame) => checkChunk(frame.chunk, origin(execution_id), { progress: true }));
    checkOrder(frames, { execution_id, end: 'completed' });
    const steps = frames.map(({ chunk }) => chunk.data).filter((data) => typeof data === 'object');
    assert.deepEqual(
      steps.map(({ agent_id, status }) => `${agent_id} ${status}`),
      ['outline running', 'outline completed', 'answer running', 'answer completed'],
    );
    assert.equal(steps.at(-1).progress, 1);
  });
}

/** @param {Verification} verification */
export async function checkFailure({ check, execute, origin, get }) {
  const fail = { runtime_overrides: { variables: { ready: 'neither true nor false' } } };
  await check('a run that fails ends with one error chunk, its code and no answer', async () => {
    const { status, headers, bytes } = await execute('/stream', fail);
    assert.equal(status, 200);
    const execution_id = headers.get('content-location')?.split('/').at(-1);
    const frames = readFrames(bytes);
    frames.forEach((frame) => checkChunk(frame.chunk, origin(execution_id)));
    checkOrder(frames, { execution_id, end: 'error' });
    const { code, error } = frames.at(-1).chunk;
    const execution = await get(`/api/executions/${execution_id}`);
    assert.equal(execution.status, 'error');
    assert.deepEqual(execution.error, { code, message: error });
    const waited = await execute('', fail);
    assert.equal(checkProblem(waited, 502, code).detail, error);
  });
}

/** @param {Verification} verification */
export async function checkAsync({ check, execute, stream, get }) {
  await check('a run in the background answers 202 at once, with links that lead to it', async () => {
    const { status, body } = await execute('/async');
    assert.equal(status, 202);
    const self = `/api/executions/${body.execution_id}`;
    const { links } = body;
    assert.deepEqual([links.self, links.stream, links.cancel], [self, `${self}/stream`, `${self}/cancel`]);
    const frames = readFrames((await stream('GET', links.stream)).bytes);
    checkOrder(frames, { execution_id: body.execution_id, end: 'completed' });
    assert.equal((await get(links.self)).response, textOf(frames));
  });
}

/**
 * The built-in model answers at once, so the end may come first. What was answered must be what happens.
 * @param {Verification} verification
 */
export async function checkCancel({ check, execute, stream, post, get }) {
  await check(
    'a cancellation that races the end is kept or refused, never acknowledged and ignored',
    async () => {
      const { execution_id, links } = (await execute('/async')).body;
      const answer = await post(links.cancel);
      if (answer.status !== 202) checkProblem(answer, 409, 'execution_finished');
      const end = answer.status === 202 ? 'cancelled' : 'completed';
      checkOrder(readFrames((await stream('GET', links.stream)).bytes), { execution_id, end });
      assert.equal((await get(links.self)).status, end);
    },
  );
}

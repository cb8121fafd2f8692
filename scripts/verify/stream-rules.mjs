/** What a stream of an execution must look like, byte by byte; every function throws an AssertionError where it does not. */
import assert from 'node:assert/strict';

export const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[1-8][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/;
export const TIMESTAMP = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/;
const CODE = /^[a-z]+(_[a-z]+)*$/;
const TERMINAL = new Set(['completed', 'error', 'cancelled']);

/** What a chunk of each kind holds beside the common fields and its origin, and nothing else; `status` chunks by their status. */
const COMMON_FIELDS = ['type', 'sequence', 'timestamp'];
const FIELDS = {
  started: ['status'],
  completed: ['status'],
  cancelled: ['status'],
  error: ['status', 'error', 'code'],
  restarted: ['status', 'agent_id', 'discard_after'],
  content: ['data', 'agent_id'],
  progress: ['data', 'agent_id'],
};
const PROGRESS_FIELDS = ['step_id', 'agent_id', 'status', 'completed_steps', 'total_steps', 'progress'];

/**
 * @typedef {{id: string, data: string, chunk: Record<string, any>}} Frame an event: its `data` as sent and parsed
 * @typedef {Record<string, string>} Origin what all chunks of an execution share: `deployment_name`, `workflow_id`,
 *   `execution_id`, and as an item of a batch `batch_id` and `item_id`
 */

/** @param {{status: number, headers: Headers}} answer */
export function checkStreamHeaders({ status, headers }) {
  assert.equal(status, 200);
  assert.match(headers.get('content-type') ?? '', /^text\/event-stream(; *charset=utf-8)?$/i);
  const cacheControl = headers.get('cache-control') ?? '';
  for (const directive of ['no-cache', 'no-transform']) {
    assert.ok(
      cacheControl.split(/, */).includes(directive),
      `Cache-Control lacks ${directive}: ${cacheControl}`,
    );
  }
  assert.equal(headers.get('x-accel-buffering'), 'no', 'X-Accel-Buffering must be no');
  assert.equal(headers.get('content-encoding'), null, 'the stream is compressed');
}

/**
 * Takes a whole stream apart: UTF-8, lines end with LF, and each event is one `id` and one line of `data`, with `retry`
 * in the first one only, and a blank line after it. Comments may stand between events.
 * @param {Uint8Array} bytes
 * @returns {Frame[]}
 */
export function readFrames(bytes) {
  const text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  assert.ok(!text.includes('\r'), 'a line ends with CR');
  assert.ok(text.endsWith('\n\n'), 'there is no blank line after the last event');
  // A blank line at the very beginning ends no event, so it means nothing to any parser.
  const blocks = text.replace(/^\n/, '').slice(0, -2).split('\n\n');
  const events = blocks.filter((block) => !block.split('\n').every((line) => line.startsWith(':')));
  return events.map((block, index) => readFrame(block, index === 0));
}

function readFrame(block, isFirst) {
  const lines = block.split('\n');
  const fields = lines.map(
    (line) => /^([a-z]+): (.*)$/s.exec(line)?.slice(1) ?? assert.fail(`not a field: ${line}`),
  );
  const names = fields.map(([name]) => name).sort();
  const allowed = isFirst && names.includes('retry') ? ['data', 'id', 'retry'] : ['data', 'id'];
  assert.deepEqual(names, allowed, `the fields of an event are ${names}: ${block}`);
  const { id, data, retry = '1' } = Object.fromEntries(fields);
  assert.match(retry, /^\d+$/);
  return { id, data, chunk: JSON.parse(data) };
}

/**
 * The events of a stream that was read to its end, as they were sent.
 * @param {{status: number, headers: Headers, bytes: Uint8Array}} answer
 */
export function readEventsOf(answer) {
  checkStreamHeaders(answer);
  return readFrames(answer.bytes).map(({ id, data }) => ({ id, data }));
}

/**
 * @param {Record<string, any>} chunk
 * @param {Origin} origin
 * @param {{progress?: boolean}} [options] whether progress was asked for
 */
export function checkChunk(chunk, origin, { progress = false } = {}) {
  const kind = chunk.type === 'status' ? chunk.status : chunk.type;
  assert.ok(Object.hasOwn(FIELDS, kind), `no kind of chunk: ${JSON.stringify(chunk)}`);
  assert.ok(progress || kind !== 'progress', 'progress without having been asked for');
  checkFields(chunk, [...COMMON_FIELDS, ...Object.keys(origin), ...FIELDS[kind]]);
  checkOrigin(chunk, origin);
  for (const field of ['error', 'code', 'agent_id']) {
    if (field in chunk)
      assert.ok(typeof chunk[field] === 'string' && chunk[field] !== '', `${field} is no text`);
  }
  if (kind === 'error') assert.match(chunk.code, CODE);
  if (kind === 'restarted') assert.ok(chunk.discard_after >= 0 && chunk.discard_after < chunk.sequence);
  if (kind === 'content') assert.equal(typeof chunk.data, 'string');
  if (kind === 'progress' && typeof chunk.data !== 'string') checkStepProgress(chunk.data);
}

/** What is the same in all chunks that come from one place, and their moment. */
export function checkOrigin(chunk, origin) {
  for (const [field, value] of Object.entries(origin)) {
    assert.equal(chunk[field], value, `${field} is ${chunk[field]}`);
    if (['workflow_id', 'execution_id', 'batch_id'].includes(field)) assert.match(chunk[field], UUID);
  }
  assert.match(chunk.timestamp, TIMESTAMP);
  assert.ok(!Number.isNaN(Date.parse(chunk.timestamp)), `no moment: ${chunk.timestamp}`);
}

function checkStepProgress(data) {
  checkFields(data, PROGRESS_FIELDS);
  assert.match(data.step_id, UUID);
  assert.equal(data.progress, data.completed_steps / data.total_steps);
}

/** @param {object} body @param {string[]} names all fields that it must have, and no other */
export function checkFields(body, names) {
  assert.deepEqual(Object.keys(body).sort(), [...names].sort(), `the fields are ${Object.keys(body)}`);
}

/**
 * Numbers 1, 2, 3 …, in the chunk and in the event's id; `started` first; exactly one terminal chunk, `end`, last.
 * @param {Frame[]} frames
 * @param {{execution_id: string, end: string}} expected
 */
export function checkOrder(frames, { execution_id, end }) {
  checkIds(frames, execution_id);
  checkSequence(frames, end);
}

/** @param {Frame[]} frames of a stream from its beginning @param {string} id of its execution or its batch */
export function checkIds(frames, id) {
  frames.forEach((frame, index) => assert.equal(frame.id, `${id}:${index + 1}`));
}

/** @param {Frame[]} frames of one execution, from its beginning @param {string} end status of the last one */
export function checkSequence(frames, end) {
  frames.forEach(({ chunk }, index) => {
    assert.equal(chunk.sequence, index + 1, `chunk ${index + 1} has the number ${chunk.sequence}`);
  });
  const statuses = frames.map(({ chunk }) => chunk.status);
  assert.equal(statuses[0], 'started', 'the first chunk is not `started`');
  assert.equal(statuses.at(-1), end, `the last chunk is not \`${end}\``);
  assert.equal(statuses.filter((status) => status === 'started').length, 1, '`started` comes again');
  assert.equal(
    statuses.filter((status) => TERMINAL.has(status)).length,
    1,
    'there are several terminal chunks',
  );
}

/** @param {Frame[]} frames */
export function textOf(frames) {
  const content = frames.filter(({ chunk }) => chunk.type === 'content');
  return content.map(({ chunk }) => chunk.data).join('');
}

/**
 * @param {{status: number, headers: Headers, body: any}} answer
 * @returns its body, a problem document (RFC 9457)
 */
export function checkProblem({ status, headers, body }, expectedStatus, code) {
  assert.equal(
    status,
    expectedStatus,
    `the status is ${status}, not ${expectedStatus}: ${JSON.stringify(body)}`,
  );
  assert.match(headers.get('content-type') ?? '', /^application\/problem\+json/);
  assert.equal(body.code, code);
  assert.equal(body.status, status);
  for (const field of ['type', 'title', 'detail', 'instance', 'request_id']) {
    assert.ok(typeof body[field] === 'string' && body[field] !== '', `${field} is missing`);
  }
  assert.doesNotMatch(body.detail, /\n\s+at /, 'the detail holds a stack trace');
  for (const fault of body.errors ?? []) {
    assert.match(fault.pointer, /^\//);
    assert.equal(typeof fault.detail, 'string');
  }
  return body;
}

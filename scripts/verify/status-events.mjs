/** Checks the live status of a deployment: a snapshot, then each change once, also after the connection broke. */
import assert from 'node:assert/strict';
import { checkFields, checkProblem, checkStreamHeaders, readFrames, TIMESTAMP } from './stream-rules.mjs';

/** @typedef {import('./verification.mjs').Verification} Verification */
/** @typedef {import('./stream-rules.mjs').Frame} Frame */

const COMMON_FIELDS = ['type', 'sequence', 'timestamp'];
const SNAPSHOT_FIELDS = [...COMMON_FIELDS, 'queued', 'running', 'executions', 'deployments'];
const CHANGE_FIELDS = [
  ...COMMON_FIELDS,
  'execution_id',
  'status',
  'attempts',
  'deployment_id',
  'deployment_name',
  'environment',
  'workflow_id',
];

/** A stream that does not end by itself. */
class EndlessStream {
  received = Buffer.alloc(0);

  /** @param {Response} response */
  constructor(response) {
    this.reader = response.body?.getReader();
  }

  /**
   * All events so far, as soon as `isLast` is true of one of them.
   * @param {(frame: Frame) => boolean} isLast
   * @returns {Promise<Frame[]>}
   */
  async until(isLast) {
    for (;;) {
      const end = this.received.lastIndexOf('\n\n') + 2;
      const frames = end < 2 ? [] : readFrames(this.received.subarray(0, end));
      if (frames.some(isLast)) return frames;
      const { done, value } = await this.reader.read().catch((error) => {
        assert.fail(`${frames.length} events came, and then nothing any more: ${error.message}`);
      });
      assert.ok(!done, `the stream ends after ${frames.length} events`);
      this.received = Buffer.concat([this.received, value]);
    }
  }

  async leave() {
    await this.reader?.cancel().catch(() => undefined); // it may have failed before
  }
}

/** @param {Verification} verification */
export async function checkStatusEvents(verification) {
  const { check, client, name } = verification;
  const path = `/api/deployments/${name}/events`;
  const streams = [];
  const open = async (address, headers) => {
    const response = await client.open('GET', address, { headers });
    const stream = new EndlessStream(response);
    streams.push(stream);
    checkStreamHeaders(response);
    return stream;
  };
  try {
    const stream = await check('the status stream of a deployment begins with a snapshot', async () => {
      const opened = await open(path);
      await checkSnapshot(verification, opened);
      return opened;
    });
    const frames = stream && (await checkChanges(verification, stream));
    if (frames) await checkReturn(verification, { frames, path, open });
  } finally {
    for (const stream of streams) await stream.leave();
  }
  await check(
    'a status cursor that is no number is refused with 400, an unknown deployment with 404',
    async () => {
      const response = await client.open('GET', path, { headers: { 'last-event-id': 'nonsense' } });
      const { status, headers } = response;
      // A stream would not end.
      const body = status === 200 ? await response.body?.cancel() : await response.json();
      checkProblem({ status, headers, body }, 400, 'invalid_cursor');
      const unknown = await client.send('GET', `/api/deployments/${name}-unknown/events`);
      checkProblem(unknown, 404, 'deployment_not_found');
    },
  );
}

async function checkSnapshot({ name, executionIds }, stream) {
  const [{ chunk: snapshot }] = await stream.until(() => true);
  checkFields(snapshot, SNAPSHOT_FIELDS);
  const { type, queued, running, executions, deployments, timestamp } = snapshot;
  assert.deepEqual(
    { type, queued, running, executions },
    { type: 'snapshot', queued: 0, running: 0, executions: [] },
  );
  assert.deepEqual(
    deployments.map(({ deployment_name, status, execution_count }) => [
      deployment_name,
      status,
      execution_count,
    ]),
    [[name, 'active', executionIds.length]],
  );
  assert.match(timestamp, TIMESTAMP);
}

/** @returns {Promise<Frame[] | undefined>} the snapshot and the changes */
async function checkChanges({ check, execute, name, workflow }, stream) {
  return check('a status stream tells each change once and in order, under numbers that ascend', async () => {
    const executed = [];
    // Whatever came twice for the first one has come when the second one's end has.
    for (let run = 0; run < 2; run++) executed.push((await execute('')).body?.execution_id);
    const frames = await stream.until(
      ({ chunk }) => chunk.execution_id === executed.at(-1) && chunk.status === 'completed',
    );
    const changes = frames.slice(1).map(({ chunk }) => chunk);
    assert.deepEqual(
      changes.map(({ execution_id, status }) => `${execution_id} ${status}`),
      executed.flatMap((id) => ['queued', 'running', 'completed'].map((status) => `${id} ${status}`)),
    );
    for (const change of changes) {
      checkFields(change, CHANGE_FIELDS);
      assert.equal(change.type, 'execution');
      assert.equal(change.deployment_name, name);
      assert.equal(change.workflow_id, workflow?.workflow_id);
      assert.match(change.timestamp, TIMESTAMP);
    }
    frames.forEach(({ id, chunk: { sequence } }, index) => {
      assert.ok(Number.isInteger(sequence), `no number: ${sequence}`);
      assert.equal(id, String(sequence));
      const before = frames[index - 1]?.chunk.sequence ?? -1;
      assert.ok(sequence > before, `${sequence} comes after ${before}`);
    });
    return frames;
  });
}

/** @param {{frames: Frame[], path: string, open: (path: string, headers?: object) => Promise<EndlessStream>}} stream as it was received */
async function checkReturn({ check, name }, { frames, path, open }) {
  const end = Number(frames.at(-1)?.id);
  const events = (list) => list.map(({ id, data }) => ({ id, data }));
  const ofAll = (id) => `/api/executions/events?deployment_name=${name}&after=${id}`;
  await check('a status stream goes on after any event, with the same bytes and no snapshot', async () => {
    for (const [index, { id }] of frames.slice(0, -1).entries()) {
      for (const stream of [await open(path, { 'last-event-id': id }), await open(ofAll(id))]) {
        const rest = await stream.until((frame) => Number(frame.id) >= end);
        assert.deepEqual(events(rest), events(frames.slice(index + 1)));
      }
    }
  });
}

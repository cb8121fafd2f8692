/** Checks that a request can be repeated without running anything twice: by its key, or by the last event that its client has. */
import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { checkOrder, checkProblem, readEventsOf, readFrames, textOf } from './stream-rules.mjs';

/** @typedef {import('./verification.mjs').Verification} Verification */
/** @typedef {import('./stream-rules.mjs').Frame} Frame */

const WAYS = ['', '/stream', '/async'];
const keyed = (key) => ({ 'idempotency-key': key });

/** @param {Verification} verification */
export async function checkIdempotencyKeys(verification) {
  const { check, execute, executionIds, started } = verification;
  const headers = keyed(randomUUID());
  const inAllWays = (more) => Promise.all(WAYS.map((way) => execute(way, more, headers)));
  await check(
    'the same key and body get the same execution in all three ways, and it runs once',
    async () => {
      // At the same moment, then after the end.
      const answers = await started(1, async () => [...(await inAllWays()), ...(await inAllWays())]);
      assert.deepEqual(
        answers.map(({ status }) => status),
        [200, 200, 202, 200, 200, 202],
      );
      const execution_id = executionIds.at(-1);
      for (const [waited, streamed, accepted] of [answers.slice(0, 3), answers.slice(3)]) {
        const frames = readFrames(streamed.bytes);
        checkOrder(frames, { execution_id, end: 'completed' });
        assert.equal(waited.body.response, textOf(frames));
        assert.equal(waited.body.execution_id, execution_id);
        assert.equal(accepted.body.execution_id, execution_id);
      }
    },
  );
  await check('another body with that key is refused with 422, and runs nothing', () =>
    started(0, async () => {
      for (const answer of await inAllWays({ query: 'something else' })) {
        checkProblem(answer, 422, 'idempotency_key_reused');
      }
    }),
  );
  await check('a key that is empty, too long or no plain text is refused with 400, and runs nothing', () =>
    started(0, async () => {
      for (const key of ['', 'x'.repeat(256), 'caf\u00e9']) {
        for (const way of WAYS) {
          checkProblem(await execute(way, {}, keyed(key)), 400, 'idempotency_key_invalid');
        }
      }
    }),
  );
}

/**
 * @param {Verification} verification
 * @param {{execution_id: string, frames: Frame[]}} stream that a POST began, as it was received in one piece
 */
export async function checkRepeatedPost(verification, { execution_id, frames }) {
  const { check, execute, started } = verification;
  const last = frames.length;
  const repeat = (event, more) => execute('/stream', more, { 'last-event-id': event });
  await check('a POST repeated with Last-Event-ID goes on with the same bytes, and runs nothing', () =>
    started(0, async () => {
      for (const sequence of [1, Math.floor(last / 2), last - 1]) {
        const answer = await repeat(`${execution_id}:${sequence}`);
        const rest = frames.slice(sequence).map(({ id, data }) => ({ id, data }));
        assert.deepEqual(readEventsOf(answer), rest);
        assert.equal(answer.headers.get('location'), `/api/executions/${execution_id}/stream`);
      }
    }),
  );
  await check('a POST repeated after the last event is answered with 204, and runs nothing', () =>
    started(0, async () => {
      assert.equal((await repeat(`${execution_id}:${last}`)).status, 204);
    }),
  );
  await check(
    'a POST with the last event of another query, or with no such event, runs nothing: 400 or 404',
    () =>
      started(0, async () => {
        const another = await repeat(`${execution_id}:1`, { query: 'something else' });
        checkProblem(another, 400, 'invalid_cursor');
        for (const event of [`${execution_id}:${last + 1}`, 'nonsense']) {
          checkProblem(await repeat(event), 400, 'invalid_cursor');
        }
        checkProblem(await repeat(`${randomUUID()}:1`), 404, 'execution_not_found');
      }),
  );
}

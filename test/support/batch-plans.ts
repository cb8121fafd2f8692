import type { ServerResponse } from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import fc from 'fast-check';
import { chatDelta, chatEnd, writeStream } from './upstream.js';

/** Which of the two servers. */
export type Place = 0 | 1;
const places = fc.constantFrom<Place>(0, 1);

const deltas = fc.record({
  text: fc.oneof(
    fc.constantFrom('a', '\r\n\r\n', '\u2028\u0085', 'data: {"status":"completed"}\n\n', '👩‍👩‍👧‍👦', '\u0000'),
    fc.string({ unit: 'binary', minLength: 1, maxLength: 20 }),
  ),
  /** It is repeated so often: now and then more than what waits in memory for one reader, or for the merger. */
  times: fc.oneof(
    { weight: 30, arbitrary: fc.constant(1) },
    { weight: 2, arbitrary: fc.integer({ min: 100, max: 5000 }) },
    { weight: 1, arbitrary: fc.constant(60_000) },
  ),
  pause: fc.oneof(
    { weight: 3, arbitrary: fc.constant(0) },
    { weight: 1, arbitrary: fc.integer({ min: 1, max: 15 }) },
  ),
});
const items = fc.record({
  deltas: fc.oneof(
    { weight: 6, arbitrary: fc.array(deltas, { maxLength: 12 }) },
    // More than is merged of one item at once.
    { weight: 1, arbitrary: fc.nat(700).map(many) },
  ),
  /** How its upstream ends: well, with a broken connection, or not at all where the batch is cancelled. */
  end: fc.constantFrom('well', 'well', 'well', 'broken', 'silent'),
});

function many(count: number) {
  return Array.from({ length: count }, () => ({ text: 'm', times: 1, pause: 0 }));
}

/** How a reader connects, and after how many events or bytes it is cut. */
const connections = fc.record({
  place: places,
  way: fc.constantFrom('post', 'key', 'header', 'after', 'header and after'),
  cut: fc.oneof(
    fc.record({ frames: fc.integer({ min: 1, max: 40 }) }),
    fc.record({ bytes: fc.integer({ min: 0, max: 20_000 }) }),
  ),
});
const readers = fc.record({
  connections: fc.array(connections, { minLength: 1, maxLength: 5 }),
  /** When it comes first: at once, after so many ms, or after the end of the batch. */
  comes: fc.oneof(fc.constant(0), fc.nat(60), fc.constant('late' as const)),
  /** Whether it reads to the end on its last connection, instead of leaving for good. */
  stays: fc.constantFrom(true, true, true, false),
});

/** One batch: its items, who reads it how, and what else happens to it. */
export const batchPlans = fc.record({
  items: fc.array(items, { minLength: 1, maxLength: 12 }),
  concurrency: fc.oneof(fc.constant(undefined), fc.integer({ min: 1, max: 4 })),
  on_item_error: fc.constantFrom(undefined, undefined, 'continue', 'stop'),
  readers: fc.array(readers, { minLength: 1, maxLength: 5 }),
  /** What starts it: the first reader's POST, or a request that answers at once. */
  start: fc.constantFrom('stream', 'accept'),
  /** Where and after how many ms it is cancelled. */
  cancel: fc.option(
    fc.record({ places: fc.array(places, { minLength: 1, maxLength: 3 }), after: fc.nat(80) }),
    {
      freq: 2,
    },
  ),
});

type ValueOf<Values> = Values extends fc.Arbitrary<infer Value> ? Value : never;
export type BatchPlan = ValueOf<typeof batchPlans>;
export type BatchReader = BatchPlan['readers'][number];
export type BatchConnection = BatchReader['connections'][number];
export type ItemPlan = BatchPlan['items'][number];

export const textOfPlan = ({ deltas }: ItemPlan) =>
  deltas.map(({ text, times }) => text.repeat(times)).join('');

/** Says what an item's upstream says. */
export async function speak(response: ServerResponse, plan: ItemPlan, canBeSilent: boolean): Promise<void> {
  writeStream(response);
  response.flushHeaders();
  for (const { text, times, pause } of plan.deltas) {
    if (pause > 0) await sleep(pause);
    if (response.destroyed) return;
    writeStream(response, chatDelta(text.repeat(times)));
  }
  if (plan.end === 'silent' && canBeSilent) return;
  if (plan.end === 'broken') return void response.destroy();
  writeStream(response, chatEnd());
  response.end();
}

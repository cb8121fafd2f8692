import type { ServerResponse } from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import fc from 'fast-check';
import { chatDelta, chatEnd, writeStream } from './upstream.js';

const texts = fc.oneof(
  fc.constantFrom('', ' ', '\r', '\n', '\r\n\r\n', '\u2028\u2029\u0085', 'a\u0000b', '\ufeff', '\u001e'),
  fc.constantFrom(
    '\n\nevent: x\ndata: {"status":"completed"}\n\n',
    'data: [DONE]',
    ': comment\n',
    '{"__proto__":',
  ),
  fc.constantFrom('\ud83d', '\udc69', '👩‍👩‍👧‍👦', '\u{10ffff}', '\\u0000', '"', '\\'),
  fc.string({ unit: 'binary', maxLength: 40 }),
);
/** A text is repeated until it is so long: now and then longer than what waits in memory for one reader. */
const lengths = fc.oneof(
  { weight: 20, arbitrary: fc.constant(1) },
  { weight: 4, arbitrary: fc.integer({ min: 1, max: 60_000 }) },
  { weight: 1, arbitrary: fc.constant(300_000) },
);
const pauses = fc.oneof(
  { weight: 3, arbitrary: fc.constant(0) },
  { weight: 1, arbitrary: fc.integer({ min: 1, max: 25 }) },
);
/** Which of the two servers. */
const places = fc.constantFrom<0 | 1>(0, 1);
/** How a reader connects, and where it is cut. */
const connections = fc.record({
  place: places,
  way: fc.constantFrom('post', 'header', 'after', 'header and after'),
  /** What is read before the connection is closed; so many bytes mostly end inside of a frame. */
  cut: fc.oneof(
    fc.record({ frames: fc.integer({ min: 1, max: 15 }) }),
    fc.record({ bytes: fc.integer({ min: 0, max: 3000 }) }),
  ),
});
const readers = fc.record({
  connections: fc.array(connections, { minLength: 1, maxLength: 6 }),
  /** Whether it reads to the end on its last connection, instead of leaving for good. */
  stays: fc.constantFrom(true, true, true, false),
});
/** One execution: what its upstream says, how its clients read it, and what else happens to it. */
export const plans = fc.record({
  deltas: fc.array(fc.record({ text: texts, length: lengths, pause: pauses }), { maxLength: 40 }),
  readers: fc.array(readers, { minLength: 1, maxLength: 4 }),
  /** What starts it: the first reader's POST, or a request that answers at once. */
  start: fc.constantFrom('stream', 'async'),
  keyed: fc.boolean(),
  /** With a key: the first POST was sent before, and its client gave up after so many ms. */
  hasty: fc.option(fc.nat(8), { freq: 2 }),
  include: fc.constantFrom(undefined, ['progress']),
  on_disconnect: fc.constantFrom(undefined, 'continue', 'cancel'),
  /** Whether the grace of `on_disconnect` can run out before the end. */
  impatient: fc.boolean(),
  /** Clients that cancel in the same moment: after so many deltas of the upstream, or at once. */
  cancel: fc.option(
    fc.record({
      places: fc.array(places, { minLength: 1, maxLength: 3 }),
      after: fc.oneof(fc.constant(0), fc.nat(40)),
      pause: fc.nat(40),
    }),
    { freq: 2 },
  ),
  /** Whether the upstream falls silent instead of ending, where something else ends the execution. */
  silent: fc.boolean(),
});

type ValueOf<Values> = Values extends fc.Arbitrary<infer Value> ? Value : never;
export type Plan = ValueOf<typeof plans>;
export type Connection = ValueOf<typeof connections>;

/** An upstream's answer to one query. */
export class Answer {
  calls = 0;
  private said = -1;
  private readonly waiting: { count: number; resolve: () => void }[] = [];

  constructor(
    private readonly deltas: Plan['deltas'],
    private readonly ends: boolean,
  ) {}

  /** All that the upstream has to say. */
  get text(): string {
    return this.deltas.map(textOf).join('');
  }

  async give(response: ServerResponse): Promise<void> {
    this.calls++;
    writeStream(response);
    response.flushHeaders();
    this.progress(0);
    for (const [index, delta] of this.deltas.entries()) {
      if (delta.pause > 0) await sleep(delta.pause);
      if (response.destroyed) return;
      writeStream(response, chatDelta(textOf(delta)));
      this.progress(index + 1);
    }
    if (!this.ends) return;
    writeStream(response, chatEnd());
    response.end();
  }

  /** Resolves when the upstream was called and has said so many deltas, or all that it will say. */
  async reached(count: number): Promise<void> {
    const goal = Math.min(count, this.deltas.length);
    if (this.said < goal) await new Promise<void>((resolve) => this.waiting.push({ count: goal, resolve }));
  }

  private progress(said: number): void {
    this.said = said;
    for (const { count, resolve } of this.waiting) if (count <= said) resolve();
  }
}

function textOf({ text, length }: Plan['deltas'][number]): string {
  return text === '' ? '' : text.repeat(Math.ceil(length / text.length));
}

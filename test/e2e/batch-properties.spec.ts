import { randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { beforeAll, describe, expect, it } from '@jest/globals';
import fc from 'fast-check';
import type { BatchDto } from '../../src/batches/batches.dto.js';
import { batchPlans, speak, textOfPlan } from '../support/batch-plans.js';
import type { BatchConnection, BatchPlan, BatchReader, ItemPlan, Place } from '../support/batch-plans.js';
import { BatchRoutes, byItem, faultsOfMerged, linesOf } from '../support/batches.js';
import { rounds } from '../support/effort.js';
import { expectByChance } from '../support/inconclusive.js';
import { EventStream, isTerminal, textOf, until, upstreamAgent } from '../support/studio.js';
import type { Frame } from '../support/studio.js';
import type { UpstreamAnswer } from '../support/upstream.js';
import { withStudio } from '../support/with-studio.js';

/** For each role of the second server. */
const RUNS = rounds(8, 3);
/** Ends what hangs: a run, and the search for a smaller one, so that fast-check gets to say how it can be repeated. */
const LONGEST_RUN_MS = 60_000;
const LONGEST_SEARCH_MS = 300_000;

interface Setting {
  places: [BatchRoutes, BatchRoutes];
  deployment: string;
  signal: AbortSignal;
}

/** What the upstream says to a query, and how often it was asked. */
const answers = new Map<string, { plan: ItemPlan; canBeSilent: boolean; calls: number }>();

/** What the upstream does. */
const upstream: UpstreamAnswer = (response, { query }) => {
  const answer = answers.get(query);
  if (!answer) return;
  answer.calls++;
  void speak(response, answer.plan, answer.canBeSilent);
};

/** What the clients of one batch share. */
class Run {
  readonly key = randomUUID();
  readonly body: { deployment_name: string; items: { item_id: string; query: string }[] };
  /** Every id that an answer named. */
  readonly ids = new Set<string>();
  readonly id: Promise<string>;
  private resolveId: (batchId: string) => void = () => {};

  constructor(
    readonly plan: BatchPlan,
    readonly setting: Setting,
  ) {
    const { items, concurrency, on_item_error, cancel } = plan;
    const asked = items.map((item, index) => {
      const query = `${this.key} ${index}`;
      answers.set(query, { plan: item, canBeSilent: cancel !== null, calls: 0 });
      return { item_id: `item ${index}`, query };
    });
    const fields = { deployment_name: setting.deployment, concurrency, on_item_error };
    this.body = { ...fields, items: asked };
    this.id = new Promise((resolve) => (this.resolveId = resolve));
  }

  at(place: Place): BatchRoutes {
    return this.setting.places[place];
  }

  name(batchId: string): void {
    this.ids.add(batchId);
    this.resolveId(batchId);
  }

  async ended(place: Place): Promise<BatchDto> {
    const id = await this.id;
    return until(async () => {
      const batch = await this.at(place).get(id);
      return batch.status === 'running' ? undefined : batch;
    });
  }

  calls(index: number): number {
    return answers.get(`${this.key} ${index}`)?.calls ?? 0;
  }
}

/** What one reader got, and what its last request was answered with; if it stayed, that one came after the end. */
interface Reading {
  frames: Frame[];
  stays: boolean;
  reconnects: number;
  lastStatus: number;
}

async function read(run: Run, { connections, comes, stays }: BatchReader, starts: boolean): Promise<Reading> {
  const reading: Reading = { frames: [], stays, reconnects: 0, lastStatus: 0 };
  if (comes === 'late' && !starts) await run.ended(0);
  else if (typeof comes === 'number' && comes > 0) await sleep(comes);
  const goOn = async (place: Place, way: BatchConnection['way'] | 'start') => {
    const last = reading.frames.at(-1);
    if (last) reading.reconnects++;
    const stream = await connect(run, { place, way, last });
    reading.lastStatus = stream.status;
    return stream;
  };
  for (const [number, { place, way, cut }] of connections.entries()) {
    const stream = await goOn(place, starts && number === 0 ? 'start' : way);
    const isCut = !stays || number < connections.length - 1;
    for await (const frame of isCut ? partOf(stream, cut) : stream) reading.frames.push(frame);
  }
  if (stays) await goOn(connections.length % 2 === 0 ? 0 : 1, 'header');
  return reading;
}

/** Asks for what follows `last`, in the way that is wanted where it is possible. */
async function connect(
  run: Run,
  { place, way, last }: { place: Place; way: BatchConnection['way'] | 'start'; last?: Frame },
): Promise<EventStream> {
  const { signal } = run.setting;
  const routes = run.at(place);
  const position = Number(last?.id.split(':')[1] ?? 0);
  const lastEventId: Record<string, string> = last ? { 'Last-Event-ID': last.id } : {};
  const key = { 'Idempotency-Key': run.key };
  let stream: EventStream;
  if (way === 'start' || (way === 'key' && !last)) {
    stream = await routes.stream(run.body, { headers: key, signal });
  } else if (way === 'key' || (way === 'post' && last)) {
    const headers = way === 'key' ? { ...key, ...lastEventId } : lastEventId;
    stream = await routes.stream(run.body, { headers, signal });
  } else {
    // The header wins: a browser repeats the URL with which it began.
    const after = way === 'after' ? `?after=${position}` : way === 'header and after' ? '?after=0' : '';
    const url = `${routes.studio.url}/api/batches/${await run.id}/stream${after}`;
    stream = new EventStream(await fetch(url, { headers: way === 'after' ? {} : lastEventId, signal }));
  }
  if (stream.status !== 200 && stream.status !== 204)
    throw new Error(`"${way}" failed: ${await stream.response.text()}`);
  if (stream.status === 200 && stream.executionId) run.name(stream.executionId);
  return stream;
}

async function* partOf(stream: EventStream, cut: BatchConnection['cut']): AsyncGenerator<Frame> {
  if ('frames' in cut) {
    let left = cut.frames;
    for await (const frame of stream) {
      yield frame;
      if (--left === 0) return;
    }
    return;
  }
  let left = cut.bytes;
  const first = new TransformStream<Uint8Array, Uint8Array>({
    transform(bytes, controller) {
      controller.enqueue(bytes.subarray(0, left));
      left -= bytes.length;
      if (left <= 0) controller.terminate();
    },
  });
  const { body, status } = stream.response;
  yield* new EventStream(new Response(body?.pipeThrough(first), { status }));
}

async function beginAndCancel(run: Run): Promise<number[]> {
  const { start, cancel } = run.plan;
  if (start === 'accept')
    run.name((await run.at(0).accept(run.body, { 'Idempotency-Key': run.key })).batch_id);
  if (!cancel) return [];
  const id = await run.id;
  await sleep(cancel.after);
  return Promise.all(cancel.places.map(async (place) => (await run.at(place).cancel(id)).status));
}

/** A batch after its end, as everybody saw it. */
interface Outcome {
  run: Run;
  readings: Reading[];
  cancellations: number[];
  batch: BatchDto;
  log: Frame[];
}

async function play(plan: BatchPlan, setting: Setting): Promise<Outcome> {
  const run = new Run(plan, setting);
  const reading = plan.readers.map((reader, index) =>
    read(run, reader, index === 0 && plan.start === 'stream'),
  );
  const [readings, cancellations] = await Promise.all([Promise.all(reading), beginAndCancel(run)]);
  const batch = await run.ended(1);
  const whole = await run.at(plan.readers.length % 2 === 0 ? 0 : 1).follow(batch.batch_id);
  return { run, readings, cancellations, batch, log: await whole.frames() };
}

/** What is not as promised. */
function faultsOf({ run, readings, cancellations, batch, log }: Outcome): string[] {
  const { items, on_item_error } = run.plan;
  const faults = faultsOfMerged(log, batch.batch_id);
  const demand = (holds: boolean, fault: string) => void (holds || faults.push(fault));
  demand(run.ids.size === 1 && run.ids.has(batch.batch_id), `there are ${run.ids.size} batches`);
  const lines = linesOf(log);
  readings.forEach(({ frames, stays, lastStatus }, index) => {
    const got = linesOf(frames);
    const wanted = stays ? lines : lines.slice(0, got.length);
    const gotAll = got.length === wanted.length && got.every((line, at) => line === wanted[at]);
    demand(gotAll, `reader ${index} has ${got.length} of ${lines.length} events, or others than the log`);
    demand(!stays || lastStatus === 204, `reader ${index} got ${lastStatus} after the end`);
  });
  const end = log.at(-1)?.chunk;
  demand(end?.status === batch.status, `the log ends as ${end?.status}, the batch as ${batch.status}`);
  const isCancelled = cancellations.includes(202);
  demand(
    batch.status === (isCancelled ? 'cancelled' : 'completed'),
    `it is ${batch.status}: ${cancellations}`,
  );
  demand(
    cancellations.every((answer) => answer === (isCancelled ? 202 : 409)),
    `${cancellations}`,
  );
  const chunks = byItem(log);
  batch.items.forEach((item, index) => {
    const is = `item ${index}`;
    const plan = items[index];
    if (!plan) return;
    const said = chunks.get(item.item_id) ?? [];
    const isEnd = said.findIndex(isTerminal);
    demand(isEnd === said.length - 1, `${is} goes on after its end`);
    demand(said.at(-1)?.chunk.status === item.status, `${is} is ${item.status}`);
    demand(textOf(said) === (item.response ?? ''), `the response of ${is} is not what it said`);
    const failed = plan.end === 'broken' ? 'error' : 'completed';
    const mayBeCancelled = isCancelled || on_item_error === 'stop';
    demand(
      item.status === failed || (mayBeCancelled && item.status === 'cancelled'),
      `${is} is ${item.status}`,
    );
    if (item.status === 'completed') demand(textOf(said) === textOfPlan(plan), `${is} said something else`);
    const calls = run.calls(index);
    demand(calls === 1 || (calls === 0 && item.status === 'cancelled'), `${is} was called ${calls} times`);
    if (item.status === 'cancelled' && !isCancelled) demand(calls === 0, `${is} began, and was stopped`);
  });
  return faults;
}

describe.each(['api', 'all'].slice(0, rounds(2, 1)))('beside a server with the role %s', (role) => {
  const system = withStudio({ upstream, others: { other: { ROLE: role } } });
  const { other } = system.others;
  let setting: Omit<Setting, 'signal'>;

  beforeAll(async () => {
    const first = new BatchRoutes(system.studio);
    const deployment = await first.studio.deploy(upstreamAgent());
    setting = { places: [first, new BatchRoutes(other.studio)], deployment };
  });

  it('every reader has the same whole merged stream, wherever it is cut and whoever merges it', async () => {
    const tally = { completed: 0, cancelled: 0, reconnects: 0, left: 0, failedItems: 0, stopped: 0 };
    const property = fc.asyncProperty(fc.array(batchPlans, { minLength: 1, maxLength: 2 }), async (some) => {
      const stop = new AbortController();
      const timer = setTimeout(() => stop.abort(), LONGEST_RUN_MS);
      try {
        const playing = some.map((plan) => play(plan, { ...setting, signal: stop.signal }));
        const outcomes = await Promise.all(playing);
        expect(outcomes.map(faultsOf)).toEqual(some.map(() => []));
        for (const { batch, readings } of outcomes) {
          tally[batch.status === 'completed' ? 'completed' : 'cancelled']++;
          tally.failedItems += batch.counts.error;
          if (batch.status === 'completed') tally.stopped += batch.counts.cancelled;
          tally.reconnects += readings.reduce((sum, { reconnects }) => sum + reconnects, 0);
          tally.left += readings.filter(({ stays }) => !stays).length;
        }
      } finally {
        clearTimeout(timer);
        stop.abort();
      }
    });
    await fc.assert(property, {
      numRuns: RUNS,
      interruptAfterTimeLimit: LONGEST_SEARCH_MS,
      markInterruptAsFailure: true,
    });
    // So that it does not pass because nothing happened.
    expectByChance('completed batches', tally.completed, rounds(1, 0));
    expectByChance('cancelled batches', tally.cancelled, rounds(1, 0));
    expectByChance('connections made again', tally.reconnects, rounds(15, 3));
    expectByChance('readers that left', tally.left, rounds(1, 0));
    expectByChance('failed items', tally.failedItems, rounds(2, 0));
  }, 330_000);

  it('leaves nothing behind', async () => {
    const count = async (rows: string) => (await system.database.query(`SELECT 1 FROM ${rows}`)).length;
    for (const { studio } of setting.places) {
      await until(async () => (await studio.metric('agent_studio_open_streams')) === 0 || undefined);
    }
    expect(await count(`execution WHERE status IN ('queued', 'running')`)).toBe(0);
    expect(await count(`batch WHERE status = 'running'`)).toBe(0);
  });
});

import { randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { beforeAll, describe, expect, it } from '@jest/globals';
import fc from 'fast-check';
import { rounds } from '../support/effort.js';
import { Answer, plans } from '../support/execution-plans.js';
import type { Connection, Plan } from '../support/execution-plans.js';
import { expectByChance } from '../support/inconclusive.js';
import { EventStream, faultsOfStream, textOf, until, upstreamAgent } from '../support/studio.js';
import type { Frame, Studio } from '../support/studio.js';
import type { UpstreamAnswer } from '../support/upstream.js';
import { withStudio } from '../support/with-studio.js';

/** For each role of the second server. */
const RUNS = rounds(15, 5);
/** Ends what hangs: a run, and the search for a smaller one, so that fast-check gets to say how it can be repeated. */
const LONGEST_RUN_MS = 60_000;
const LONGEST_SEARCH_MS = 300_000;

/** What the clients of one execution share. */
class Run {
  readonly query = randomUUID();
  readonly body: object;
  readonly headers: Record<string, string>;
  readonly answer: Answer;
  /** For those who leave: aborts when nothing more is to come while the execution lasts until they have left. */
  readonly leave = new AbortController();
  /** Every id that an answer named. */
  readonly ids = new Set<string>();
  readonly id: Promise<string>;
  /** Whether it may be cancelled for want of clients. */
  readonly canBeAbandoned: boolean;
  private resolveId: (executionId: string) => void = () => {};

  constructor(
    readonly plan: Plan,
    readonly setting: Setting,
  ) {
    const { deltas, cancel, include, on_disconnect, keyed, silent, impatient, start } = plan;
    this.canBeAbandoned = impatient && on_disconnect === 'cancel' && cancel === null;
    const isAbandoned = this.canBeAbandoned && start === 'stream' && !plan.readers.some(({ stays }) => stays);
    const isSilent = silent && (isAbandoned || cancel !== null);
    setting.signal.addEventListener('abort', () => this.leave.abort());
    this.answer = new Answer(deltas, !isSilent);
    if (isSilent && isAbandoned) void this.answer.reached(deltas.length).then(() => this.leave.abort());
    const mayRunOut = impatient && (this.canBeAbandoned || on_disconnect !== 'cancel');
    const deployment_name = mayRunOut ? setting.impatient : setting.patient;
    this.body = { deployment_name, query: this.query, include, on_disconnect };
    this.headers = keyed ? { 'Idempotency-Key': this.query } : {};
    this.id = new Promise((resolve) => (this.resolveId = resolve));
  }

  at(place: 0 | 1): Studio {
    return place === 0 ? this.setting.first : this.setting.second;
  }

  name(executionId: string): void {
    this.ids.add(executionId);
    this.resolveId(executionId);
  }
}

interface Setting {
  first: Studio;
  second: Studio;
  patient: string;
  impatient: string;
  signal: AbortSignal;
}

/** What one reader got, and what its last request was answered with; if it stayed, that one came after the end. */
interface Reading {
  frames: Frame[];
  stays: boolean;
  reconnects: number;
  lastStatus: number;
}

async function read(
  run: Run,
  { connections, stays }: Plan['readers'][number],
  isFirst: boolean,
): Promise<Reading> {
  const reading: Reading = { frames: [], stays, reconnects: 0, lastStatus: 0 };
  const { signal } = stays ? run.setting : run.leave;
  const goOn = async ({ place, way }: Pick<Connection, 'place' | 'way'>, starts = false) => {
    const last = reading.frames.at(-1);
    const stream = await connect(run, { at: run.at(place), way: starts ? 'start' : way, last, signal });
    if (last) reading.reconnects++;
    reading.lastStatus = stream.status;
    return stream;
  };
  try {
    for (const [number, connection] of connections.entries()) {
      const stream = await goOn(connection, isFirst && number === 0 && run.plan.start === 'stream');
      const isCut = !stays || number < connections.length - 1;
      for await (const frame of isCut ? partOf(stream, connection.cut) : stream) reading.frames.push(frame);
    }
    if (stays) await goOn({ place: connections.length % 2 === 0 ? 0 : 1, way: 'header' });
  } catch (error) {
    if (!run.leave.signal.aborted || run.setting.signal.aborted) throw error;
  }
  return reading;
}

/** Asks for what follows `last`, in the way that is wanted where it is possible. */
async function connect(
  run: Run,
  {
    at,
    way,
    last,
    signal,
  }: { at: Studio; way: Connection['way'] | 'start'; last?: Frame; signal: AbortSignal },
): Promise<EventStream> {
  const lastEventId: Record<string, string> = last ? { 'Last-Event-ID': last.id } : {};
  const isPost = way === 'start' || (way === 'post' && (last !== undefined || run.plan.keyed));
  let stream: EventStream;
  if (isPost) {
    stream = await at.stream(run.body, { headers: { ...run.headers, ...lastEventId }, signal });
  } else {
    // The header wins: a browser repeats the URL with which it began.
    const after = {
      post: '',
      header: '',
      after: `?after=${last?.chunk.sequence ?? 0}`,
      'header and after': '?after=0',
    };
    const url = `${at.url}/api/executions/${await run.id}/stream${after[way]}`;
    stream = new EventStream(await fetch(url, { headers: way === 'after' ? {} : lastEventId, signal }));
  }
  if (stream.status !== 200 && stream.status !== 204)
    throw new Error(`"${way}" failed: ${await stream.response.text()}`);
  if (isPost && stream.status === 200) run.name(stream.executionId);
  return stream;
}

async function* partOf(stream: EventStream, cut: Connection['cut']): AsyncGenerator<Frame> {
  if ('bytes' in cut) return yield* new EventStream(firstBytes(stream.response, cut.bytes));
  let left = cut.frames;
  for await (const frame of stream) {
    yield frame;
    if (--left === 0) return;
  }
}

function firstBytes(response: Response, count: number): Response {
  let left = count;
  const cut = new TransformStream<Uint8Array, Uint8Array>({
    transform(bytes, controller) {
      controller.enqueue(bytes.subarray(0, left));
      left -= bytes.length;
      if (left <= 0) controller.terminate();
    },
  });
  return new Response(response.body?.pipeThrough(cut), { status: response.status });
}

/** Starts what no reader starts, and cancels what is to be cancelled. @returns the statuses of the cancellations */
async function beginAndCancel(run: Run): Promise<number[]> {
  const { start, cancel } = run.plan;
  const { body, headers } = run;
  if (start === 'async') {
    const request = { method: 'POST', body, headers };
    const accepted = await run.at(0).json<{ execution_id: string }>('/api/workflows/execute/async', request);
    run.name(accepted.body.execution_id);
  }
  if (!cancel) return [];
  const path = `/api/executions/${await run.id}/cancel`;
  if (cancel.after > 0) await run.answer.reached(cancel.after - 1);
  if (cancel.pause > 0) await sleep(cancel.pause);
  const asked = cancel.places.map((place) => run.at(place).json(path, { method: 'POST' }));
  return (await Promise.all(asked)).map(({ status }) => status);
}

interface ExecutionState {
  status: string;
  response?: string;
}

/** An execution after its end, as everybody saw it. */
interface Outcome {
  run: Run;
  readings: Reading[];
  cancellations: number[];
  /** What each of the servers says. */
  states: [ExecutionState, ExecutionState];
  /** Its log, read in one go. */
  log: Frame[];
}

async function play(plan: Plan, setting: Setting): Promise<Outcome> {
  const run = new Run(plan, setting);
  answers.set(run.query, run.answer);
  if (plan.hasty !== null && plan.keyed && plan.start === 'stream') {
    const signal = AbortSignal.timeout(plan.hasty);
    await setting.first.stream(run.body, { headers: run.headers, signal }).catch(() => undefined);
  }
  const reading = Promise.all(plan.readers.map((reader, index) => read(run, reader, index === 0)));
  const [readings, cancellations] = await Promise.all([reading, beginAndCancel(run)]);
  const id = await run.id;
  const stateAt = (studio: Studio) =>
    until(async () => {
      const { body } = await studio.json<ExecutionState>(`/api/executions/${id}`);
      return body.status === 'queued' || body.status === 'running' ? undefined : body;
    });
  const states: Outcome['states'] = [await stateAt(setting.first), await stateAt(setting.second)];
  const whole = await run
    .at(plan.readers.length % 2 === 0 ? 0 : 1)
    .follow(id, undefined, { signal: setting.signal });
  return { run, readings, cancellations, states, log: await whole.frames() };
}

/** What is not as promised. */
function faultsOf({ run, readings, cancellations, states, log }: Outcome): string[] {
  const [id = ''] = run.ids;
  const faults = faultsOfStream(log, id);
  const demand = (holds: boolean, fault: string) => void (holds || faults.push(fault));
  demand(run.ids.size === 1, `there are ${run.ids.size} executions`);
  const lines = log.map((frame) => `${frame.id} ${frame.data}`);
  readings.forEach(({ frames, stays, lastStatus }, index) => {
    const wanted = stays ? lines : lines.slice(0, frames.length);
    const got = frames.map((frame) => `${frame.id} ${frame.data}`);
    const gotAll = got.length === wanted.length && got.every((line, at) => line === wanted[at]);
    demand(gotAll, `reader ${index} has ${got.length} of ${lines.length} chunks, or others than the log`);
    demand(!stays || lastStatus === 204, `reader ${index} got ${lastStatus} after the end`);
  });

  const [{ status, response = '' }, other] = states;
  demand(status === other.status && response === (other.response ?? ''), 'the servers do not agree');
  demand(log.at(-1)?.chunk.status === status, `the log ends otherwise than as ${status}`);
  demand(response === textOf(log), 'the response is not the text of the log');
  const { calls, text } = run.answer;
  demand(
    status === 'completed' ? response === text : text.startsWith(response),
    'the text is not that of the upstream',
  );

  const isCancelled = cancellations.includes(202) || (run.canBeAbandoned && status === 'cancelled');
  demand(
    status === (isCancelled ? 'cancelled' : 'completed'),
    `it is ${status} after ${cancellations.join()}`,
  );
  const refusal = status === 'cancelled' ? 202 : 409;
  demand(
    cancellations.every((answer) => answer === refusal),
    `${cancellations.join()} for ${status}`,
  );
  demand(calls === 1 || (calls === 0 && status === 'cancelled'), `the upstream was called ${calls} times`);
  return faults;
}

/** By the query that is asked. */
const answers = new Map<string, Answer>();

const upstream: UpstreamAnswer = (response, { query }) => void answers.get(query)?.give(response);

describe.each(['api', 'all'].slice(0, rounds(2, 1)))('beside a server with the role %s', (role) => {
  const system = withStudio({ upstream, others: { other: { ROLE: role } } });
  let setting: Omit<Setting, 'signal'>;

  beforeAll(async () => {
    const first = system.studio;
    const patient = await first.deploy(upstreamAgent(), { disconnect_grace_ms: 600_000 });
    const impatient = await first.deploy(upstreamAgent(), { disconnect_grace_ms: 100 });
    setting = { first, second: system.others.other.studio, patient, impatient };
  });

  it('whoever stays has the whole log, wherever connections are cut and whatever ends the execution', async () => {
    const tally = { completed: 0, cancelled: 0, reconnects: 0, left: 0 };
    const property = fc.asyncProperty(fc.array(plans, { minLength: 1, maxLength: 3 }), async (some) => {
      const stop = new AbortController();
      const timer = setTimeout(() => stop.abort(), LONGEST_RUN_MS);
      try {
        const playing = some.map((plan) => play(plan, { ...setting, signal: stop.signal }));
        const outcomes = await Promise.all(playing);
        expect(outcomes.map(faultsOf)).toEqual(some.map(() => []));
        for (const { states, readings } of outcomes) {
          tally[states[0].status === 'completed' ? 'completed' : 'cancelled']++;
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
    expectByChance('completed executions', tally.completed, rounds(4, 1));
    expectByChance('cancelled executions', tally.cancelled, rounds(4, 0));
    expectByChance('connections made again', tally.reconnects, rounds(60, 10));
    expectByChance('readers that left', tally.left, rounds(3, 0));
  }, 330_000);

  it('leaves nothing behind', async () => {
    const count = async (rows: string) => (await system.database.query(`SELECT 1 FROM ${rows}`)).length;
    for (const studio of [setting.first, setting.second]) {
      await until(async () => (await studio.metric('agent_studio_open_streams')) === 0);
    }
    await until(async () => (await count('execution_subscriber WHERE count > 0')) === 0);
    expect(await count(`execution WHERE status IN ('queued', 'running')`)).toBe(0);
  });
});

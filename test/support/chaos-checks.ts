import type { Execution } from '../../src/database/entities/execution.entity.js';
import type { Step } from '../../src/database/entities/step.entity.js';
import { answerOf } from './call-ledger.js';
import type { Chaos, Completion } from './chaos.js';
import type { ClientRun } from './chaos-clients.js';
import { each } from './each.js';
import { faultsOfStream, kept, textOf } from './studio.js';
import type { Frame } from './studio.js';

/** An agent of a deployment, and how many pieces its model says. */
export interface SpeakingAgent {
  agent_id: string;
  pieces: number;
}

export interface Expectation {
  /** Of a run: which of its agents speak to clients. */
  speakers: (run: ClientRun) => SpeakingAgent[];
  /**
   * When PostgreSQL itself crashed, by the clock on the wall. It may have forgotten chunks that clients had, and that an
   * execution was taken up (docs/architecture.md).
   */
  crashes?: number[];
}

/** Fails with what is wrong with runs that were to complete: their streams, their logs, their texts, the calls they made. */
export async function expectWhole(
  chaos: Chaos,
  runs: ClientRun[],
  { speakers, crashes = [] }: Expectation,
): Promise<void> {
  const ids = runs.map(({ executionId }) => executionId);
  const rows = new Map((await chaos.rows(ids)).map((row) => [row.execution_id, row]));
  const steps = await chaos.steps(ids);
  const completions = await chaos.completions(ids);
  const faults: string[] = [];
  if (new Set(ids).size !== ids.length) faults.push('two requests got the same execution');
  await each(runs, 8, async (run) => {
    const log = await chaos.log(run.executionId);
    const isOwn = ({ execution_id }: { execution_id: string }) => execution_id === run.executionId;
    const own = { steps: steps.filter(isOwn), completions: completions.filter(isOwn) };
    const row = rows.get(run.executionId);
    const isForgotten = crashes.some((at) => row && at >= row.created_at.getTime() && at <= endOf(row));
    const attempts = isForgotten ? Infinity : (row?.attempt ?? 0);
    const found = [
      ...run.faults,
      ...faultsOfRow(row),
      ...faultsOfStream(log, run.executionId),
      ...faultsOfText(log, { marker: run.marker, speakers: speakers(run), attempts }),
      ...(isForgotten ? [] : [...faultsOfDelivery(run, log), ...faultsOfPosition(run)]),
      ...faultsOfCalls(chaos, { marker: run.marker, ...own, attempts }),
    ];
    if (found.length === 0) return;
    faults.push(`${run.marker}: ${found.join('; ')}`);
    if (faults.length <= 5) faults.push(await chaos.describe(run.executionId));
  });
  if (faults.length > 0) throw new Error(`Of ${runs.length} runs:\n${faults.join('\n')}`);
}

const endOf = ({ finished_at }: Execution) => finished_at?.getTime() ?? Infinity;

function faultsOfRow(row: Execution | undefined): string[] {
  if (!row) return ['it is not in the database'];
  return row.status === 'completed' ? [] : [`it ended as ${row.status} (${row.code}: ${row.error})`];
}

/** What a client received is the log, chunk by chunk. */
function faultsOfDelivery({ frames }: ClientRun, log: Frame[]): string[] {
  if (frames.length === 0) return [];
  const different = frames.findIndex(({ data }, index) => data !== log[index]?.data);
  if (different >= 0) return [`chunk ${different + 1} was delivered as ${frames[different]?.data}`];
  return frames.length === log.length ? [] : [`${frames.length} of ${log.length} chunks were delivered`];
}

/** Nothing that a client had was taken back. */
function faultsOfPosition({ rereads }: ClientRun): string[] {
  return rereads === 0 ? [] : [`its position was refused ${rereads} times`];
}

function faultsOfText(
  log: Frame[],
  { marker, speakers, attempts }: { marker: string; speakers: SpeakingAgent[]; attempts: number },
): string[] {
  return speakers.flatMap(({ agent_id, pieces }) => {
    const expected = answerOf(marker, agent_id, pieces);
    const faults: string[] = [];
    if (textOf(kept(log), agent_id) !== expected)
      faults.push(`${agent_id} said ${textOf(kept(log), agent_id).slice(-200)}`);
    const restarts = log.flatMap(({ chunk }, index) =>
      chunk.status === 'restarted' && chunk.agent_id === agent_id ? [index] : [],
    );
    if (restarts.length > Math.max(0, attempts - 1))
      faults.push(`${agent_id} has ${restarts.length} restarts in ${attempts} attempts`);
    // Each attempt says the answer from its beginning, and none goes on where another one was.
    [...restarts, log.length].forEach((end, index) => {
      const part = textOf(log.slice(restarts[index - 1] ?? 0, end), agent_id);
      if (!expected.startsWith(part)) faults.push(`${agent_id} said in one attempt ${part.slice(-200)}`);
    });
    const isSilent = textOf(log.slice(0, restarts[0]), agent_id) === '';
    if (restarts.length > 0 && isSilent) faults.push(`${agent_id} restarted before it had spoken`);
    return faults;
  });
}

/** By the ledger: a finished step is never called again, and none is called more often than it was taken up. */
function faultsOfCalls(chaos: Chaos, { marker, steps, completions, attempts }: CalledSteps): string[] {
  const called = new Set(chaos.ledger.of(marker).map(({ agent }) => agent));
  steps.forEach(({ agent_id }) => called.delete(agent_id));
  const faults = [...called].map((agent) => `${agent} was called and has no step`);
  if (steps.length === 0) faults.push('it has no step');
  return faults.concat(steps.flatMap((step) => faultsOfStep(chaos, step, { marker, completions, attempts })));
}

function faultsOfStep(
  chaos: Chaos,
  { agent_id, status }: Step,
  { marker, completions, attempts }: Omit<CalledSteps, 'steps'>,
): string[] {
  const calls = chaos.ledger.of(marker, agent_id);
  const completion = completions.find((candidate) => candidate.agent_id === agent_id);
  if (status !== 'completed' || !completion) return [`${agent_id} is ${status}`];
  const faults: string[] = [];
  const late = calls.filter(({ begunAt }) => begunAt > completion.completed_at.getTime());
  if (late.length > 0) faults.push(`${agent_id} was called ${late.length} times after its end`);
  if (calls.length > attempts) faults.push(`${agent_id}: ${calls.length} calls in ${attempts} attempts`);
  if (calls.length === 0) faults.push(`${agent_id} was never called`);
  return faults;
}

interface CalledSteps {
  marker: string;
  steps: Step[];
  completions: Completion[];
  attempts: number;
}

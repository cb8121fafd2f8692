import { setTimeout as sleep } from 'node:timers/promises';
import { expect } from '@jest/globals';
import { inconclusive } from './inconclusive.js';
import { Studio, echo } from './studio.js';
import type { ServerProcess } from './studio-process.js';

/** What is promised on an idle machine, ms: an execution of a bystander ends, and the event loop answers, within that time. */
const PROMISED = { slowest: 1000, silence: 250 };
/** What a calm bystander meets on an idle machine at most, ms. A calm one that met more widens the promise by as much. */
const CALM = { slowest: 50, silence: 50 };
/** A calm bystander that met more than this many times as much proves nothing about the attack. */
const NOISY = 5;
/** Executions that make a calm. */
const CALM_EXECUTIONS = 20;
/** An execution that takes so long is given up, ms. */
const GIVE_UP_MS = 60_000;
/** What an attack has left behind is over after so long, ms: it excuses nothing. */
const AFTERMATH_MS = 2000;
/** How often an attack may be repeated: what else the machine does can only lengthen what is measured. */
const MOST_TRIES = 3;

/** What another client met during some time. */
export interface Witnessed {
  /** Executions that ended as they should. */
  executions: number;
  /** The longest of them, from the request to the whole answer, ms. */
  slowest: number;
  /** The longest silence of the server's event loop, ms. */
  silence: number;
  /** What its other executions ended with, and whether the server's process ended. */
  faults: string[];
}

/** What a bystander met before an attack and during it, and what the attack itself resolved with. */
export interface Witness<Outcome> {
  calm: Witnessed;
  attacked: Witnessed;
  outcome: Outcome;
}

/**
 * Lets another client execute one thing after the other at `server`: first alone, then while `attack` is under way, and
 * until one more has ended after it. Where the attack seems to have harmed it, it is witnessed alone once more, since the machine may have
 * become slower, and the attack is repeated; the last one counts. Take {@link expectUnharmed} to judge what it met:
 *
 *     const server = await ServerProcess.start({ DATABASE_URL: database.url });
 *     const witness = await withBystander(server, () => studio.execute(hostile));
 *     expectUnharmed(witness);
 *     expect(witness.outcome.body.code).toBe('agent_error');
 */
export async function withBystander<Outcome>(
  server: ServerProcess,
  attack: () => Promise<Outcome>,
): Promise<Witness<Outcome>> {
  const studio = new Studio(server.url);
  const deployment_name = await studio.deploy(echo());
  const run = () => execute(studio, deployment_name);
  await run();
  for (let tries = 1; ; tries++) {
    const found = await witnessBoth(server, run, attack);
    if (tries === MOST_TRIES || found.attacked.faults.length > 0 || harmsOf(found).length === 0) return found;
  }
}

async function witnessBoth<Outcome>(
  server: ServerProcess,
  run: () => Promise<string | undefined>,
  attack: () => Promise<Outcome>,
): Promise<Witness<Outcome>> {
  const calm = await witnessCalm(server, run);
  const { witnessed: attacked, result } = await witness(server, run, async (another) => {
    const outcome = await attack();
    await another(); // was under way already, perhaps at its end
    await another();
    return outcome;
  });
  const found = { calm, attacked, outcome: result };
  if (attacked.faults.length > 0 || harmsOf(found).length === 0) return found;
  await sleep(AFTERMATH_MS);
  const after = await witnessCalm(server, run);
  const slowest = Math.max(calm.slowest, after.slowest);
  const silence = Math.max(calm.silence, after.silence);
  return {
    ...found,
    calm: { ...calm, slowest, silence },
    attacked: { ...attacked, faults: after.faults },
  };
}

async function witnessCalm(
  server: ServerProcess,
  run: () => Promise<string | undefined>,
): Promise<Witnessed> {
  const { witnessed } = await witness(server, run, async (another) => {
    for (let executions = 0; executions < CALM_EXECUTIONS; executions++) await another();
  });
  return witnessed;
}

/** Fails if the bystander was harmed; inconclusive where the machine was too busy to tell. */
export function expectUnharmed(found: Witness<unknown>): void {
  expect(found.attacked.faults).toEqual([]);
  expect(found.attacked.executions).toBeGreaterThan(0);
  for (const { what, isNoisy } of harmsOf(found)) {
    if (!isNoisy) throw new Error(`The bystander was harmed. ${what}.`);
    inconclusive(what);
  }
}

/** What of that which is promised a bystander did not get, and whether a calm one was so slow that it proves nothing. */
export function harmsOf({ calm, attacked }: Witness<unknown>): { what: string; isNoisy: boolean }[] {
  return (['slowest', 'silence'] as const).flatMap((kind) => {
    const slower = Math.max(1, calm[kind] / CALM[kind]);
    const limit = PROMISED[kind] * slower;
    if (attacked[kind] <= limit) return [];
    const what = `${kind}: ${Math.round(attacked[kind])} ms during the attack, ${Math.round(calm[kind])} ms before; at most ${Math.round(limit)} ms is promised`;
    return [{ what, isNoisy: slower > NOISY }];
  });
}

/** Executes one after the other while `work` is done, which may wait for `another` execution to end. */
async function witness<Result>(
  server: ServerProcess,
  run: () => Promise<string | undefined>,
  work: (another: () => Promise<void>) => Promise<Result>,
): Promise<{ witnessed: Witnessed; result: Result }> {
  await server.silence(); // what was before does not count
  const took: number[] = [];
  const faults: string[] = [];
  let isOver = false;
  let running: Promise<void> = Promise.resolve();
  const runOne = async () => {
    const begun = performance.now();
    const fault = await run();
    if (fault === undefined) took.push(performance.now() - begun);
    else faults.push(fault);
  };
  const working = (async () => {
    while (!isOver && server.lives) await (running = runOne());
  })();
  let result: Result;
  try {
    result = await work(() => running);
  } finally {
    isOver = true;
    await working;
  }
  if (!server.lives) faults.push("the server's process has ended");
  const silence = server.lives ? await server.silence() : Infinity;
  return { witnessed: { executions: took.length, slowest: Math.max(0, ...took), silence, faults }, result };
}

/** @returns what was wrong with the answer, if anything */
async function execute(studio: Studio, deployment_name: string): Promise<string | undefined> {
  try {
    const answer = await fetch(`${studio.url}/api/workflows/execute`, {
      method: 'POST',
      headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify({ deployment_name, query: 'bystander' }),
      signal: AbortSignal.timeout(GIVE_UP_MS),
    });
    const text = await answer.text();
    return answer.status === 200 && text.includes('bystander')
      ? undefined
      : `${answer.status} ${text.slice(0, 300)}`;
  } catch (error) {
    return String(error);
  }
}

import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import type { Execution } from '../../src/database/entities/execution.entity.js';
import type { ModelCall } from '../support/call-ledger.js';
import { Chaos, PATIENCE_MS, START_MS } from '../support/chaos.js';
import type { StackProcess } from '../support/chaos.js';
import { expectWhole } from '../support/chaos-checks.js';
import type { SpeakingAgent } from '../support/chaos-checks.js';
import type { ChaosClient, ClientRun } from '../support/chaos-clients.js';
import { expectByChance } from '../support/inconclusive.js';
import { until } from '../support/studio.js';

/**
 * What a killed or restarted process was in the middle of has ended within this time after the last such moment: a worker that has just
 * started watches the others for a lease before it takes anything over, and what lost two workers runs one at a time in each process.
 */
const ALL_ENDED_MS = 60_000;
const RUNS = Number(process.env.CHAOS_RUNS ?? 40);
/** How many of them are under way at once. */
const AT_ONCE = 14;
/** A whole test; only ends one that hangs. */
const HANG_MS = 170_000 + RUNS * 1000;
/** Between a kill and the next one that is left to chance, at least and at most. */
const CALM_MS = [300, 2500] as const;

let chaos: Chaos;
/** The deployments, and which of their agents speak to clients. */
const deployments = new Map<string, SpeakingAgent[]>();
/** Of each run by its marker. */
const deploymentOf = new Map<string, string>();

/** Starts the processes before the tests of a `describe`, and ends them after these. */
function withChaos(env: Record<string, string>): void {
  beforeAll(async () => {
    chaos = await Chaos.start({ env });
    await deployAll();
  }, START_MS);
  afterAll(() => chaos?.stop(), START_MS);
}

async function deployAll(): Promise<void> {
  const { ledger } = chaos;
  const studio = chaos.studio();
  const long = { pieces: 20, pauseMs: 40 };
  const agent = (id: string) => ledger.agent(id, long.pieces, long.pauseMs);
  const connect = (source_agent_id: string, target_agent_id: string) => ({
    source_agent_id,
    target_agent_id,
  });
  const speaking = (...agentIds: string[]) => agentIds.map((agent_id) => ({ agent_id, pieces: long.pieces }));
  const chain = {
    agents: ['first', 'last'].map(agent),
    connections: [connect('first', 'last')],
  };
  const fork = {
    agents: ['stem', 'left', 'right'].map(agent),
    connections: [connect('stem', 'left'), connect('stem', 'right')],
  };
  const joined = {
    agents: ['one', 'other', 'join'].map(agent),
    connections: [connect('one', 'join'), connect('other', 'join')],
  };
  deployments.clear();
  deployments.set(await studio.deploy({ agents: [agent('alone')] }), speaking('alone'));
  deployments.set(await studio.deploy(chain), speaking('last'));
  deployments.set(await studio.deploy(fork), speaking('left', 'right'));
  deployments.set(await studio.deploy(joined), speaking('join'));
}

function speakersOf({ marker }: ClientRun): SpeakingAgent[] {
  const speakers = deployments.get(deploymentOf.get(marker) ?? '');
  if (!speakers) throw new Error(`${marker} is of no deployment.`);
  return speakers;
}

/** A client of some deployment. */
function someClient(): ChaosClient {
  const deployment = chaos.random.pick([...deployments.keys()]);
  const marker = chaos.marker();
  deploymentOf.set(marker, deployment);
  return chaos.client(deployment, marker);
}

/** Three of five runs are streamed, the others only accepted. */
function startRun(): Promise<ClientRun> {
  const client = someClient();
  return chaos.random.int(1, 5) <= 3 ? client.stream() : client.accept();
}

/** Keeps some runs under way until there were enough, and the disturbances were enough. */
async function runMany(isEnough: () => boolean): Promise<ClientRun[]> {
  const runs: ClientRun[] = [];
  let begun = 0;
  const one = async () => {
    while (begun < RUNS || !isEnough()) {
      begun++;
      const run = await startRun();
      runs.push(run);
      // One that nobody follows counts as under way, too.
      if (run.frames.length === 0) await chaos.ended([run], PATIENCE_MS);
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, one));
  return runs;
}

/** Disturbs the system again and again while the work is done; resolves when both are over. */
async function disturbedBy<Result>(disturb: () => Promise<void>, work: Promise<Result>): Promise<Result> {
  let isDone = false;
  const disturbing = (async () => {
    while (!isDone) await disturb();
  })();
  try {
    return await work;
  } finally {
    isDone = true;
    await disturbing;
  }
}

const ids = (runs: ClientRun[]) => runs.map(({ executionId }) => executionId);

/** What was under way when a process was ended had its own end soon after the last of these moments. */
async function expectSoonEnded(runs: ClientRun[], moments: number[]): Promise<void> {
  const hit = (await chaos.rows(ids(runs))).filter(({ created_at, finished_at }) =>
    moments.some((moment) => created_at.getTime() <= moment && timeOf(finished_at) > moment),
  );
  expectByChance('executions under way when a process was ended', hit.length, 1);
  const latest = Math.max(...moments) + ALL_ENDED_MS;
  const late = hit.filter(({ finished_at }) => timeOf(finished_at) > latest);
  expect(late.map(({ execution_id }) => execution_id)).toEqual([]);
}

const timeOf = (end: Date | null) => end?.getTime() ?? Infinity;

async function takeovers(runs: ClientRun[]): Promise<number> {
  const rows = await chaos.rows(ids(runs));
  return rows.filter(({ attempt }) => attempt > 1).length;
}

/** A worker in the middle of a call. */
async function findVictim(): Promise<StackProcess | undefined> {
  const open = chaos.ledger.calls.filter(({ endedAt }) => endedAt === undefined);
  return callerOf(open.length > 0 ? chaos.random.pick(open) : undefined);
}

/** Who made a call, which may have ended meanwhile. */
async function callerOf(call: ModelCall | undefined): Promise<StackProcess | undefined> {
  return call && chaos.callerOf(call).catch(() => undefined);
}

describe('processes that are killed', () => {
  // The fewer of its losses have to be told from those of bystanders, the sooner one of these would be given up.
  withChaos({ MAX_LOST_ATTEMPTS: '2' });

  it(
    'lose none of many executions, repeat none, run no finished step again, and give up only the one that kills them',
    async () => {
      await chaos.reporting(async () => {
        const { ledger } = chaos;
        const marker = chaos.marker('poison');
        ledger.hold(marker);
        const [deployment = ''] = deployments.keys();
        const { executionId } = await chaos.client(deployment, marker).accept();
        let poisoned: Execution | undefined;
        let calls = 0;
        const kills: number[] = [];
        const isCalled = () => ledger.of(marker).length > calls;
        const findWorker = () => (isCalled() ? callerOf(ledger.of(marker)[calls++]) : findVictim());
        // Whoever calls its model is killed, now and then another one, and each third time an api process.
        const killOne = async () => {
          const calm = chaos.random.int(...CALM_MS);
          await until(() => isCalled() || Date.now() > chaos.killedAt + calm);
          if (poisoned?.status === 'error') return sleep(calm); // the last executions end in peace
          const victim = kills.length % 3 === 1 ? chaos.random.pick(chaos.stack.apis) : await findWorker();
          if (victim) {
            await chaos.kill(victim);
            kills.push(chaos.killedAt);
          }
          [poisoned] = await chaos.rows([executionId]);
        };
        const runs = await disturbedBy(
          killOne,
          runMany(() => poisoned?.status === 'error'),
        );
        process.stderr.write(`${runs.length} executions, ${chaos.kills} kills\n`);
        expect(poisoned).toMatchObject({ status: 'error', code: 'worker_lost' });
        await expectSoonEnded(runs, kills);
        await expectWhole(chaos, runs, { speakers: speakersOf });
        expectByChance('executions that were taken over', await takeovers(runs), 3);
        expectByChance('clients cut off', runs.filter(({ connections }) => connections > 1).length, 1);
      }, HANG_MS);
    },
    HANG_MS + 10_000,
  );

  it(
    'end all that they had accepted when they are killed together, their database included',
    async () => {
      await chaos.reporting(async () => {
        const { postgres, redis, apis, workers } = chaos.stack;
        const accepted = await Promise.all(Array.from({ length: 40 }, () => someClient().accept()));
        const markers = new Set(accepted.map(({ marker }) => marker));
        await until(async () => (await takenUp(accepted)) >= 10);
        const crashes = [Date.now()];
        await Promise.all([postgres, redis, ...apis, ...workers].map(async (part) => part?.stop('SIGKILL')));
        await Promise.all([postgres?.start(), redis?.start()]);
        await Promise.all([...apis, ...workers].map((server) => server.start()));
        await chaos.ended(accepted, PATIENCE_MS);
        await expectWhole(chaos, accepted, { speakers: speakersOf, crashes });
        const calledAgain = chaos.ledger.calls.filter(
          ({ marker, ordinal }) => markers.has(marker) && ordinal > 1,
        );
        expectByChance('calls made again', calledAgain.length, 5);
      }, HANG_MS);
    },
    HANG_MS + 10_000,
  );
});

describe('processes that are restarted in turn', () => {
  // Longer than any pause of a busy machine: what is taken over then was handed back.
  withChaos({ JOB_LOCK_MS: '20000' });

  it(
    'hand back what they run, lose nothing, and close no stream with an invented end',
    async () => {
      await chaos.reporting(async () => {
        const { apis, workers } = chaos.stack;
        const inTurn = [workers[0], apis[0], workers[1], apis[1]];
        const restarts: number[] = [];
        const restartNext = async () => {
          const next = inTurn[restarts.length % inTurn.length];
          restarts.push(Date.now());
          await next?.restart('SIGTERM');
        };
        const runs = await disturbedBy(
          restartNext,
          runMany(() => restarts.length >= inTurn.length),
        );
        await expectSoonEnded(runs, restarts);
        expect(runs.length).toBeGreaterThanOrEqual(RUNS);
        await expectWhole(chaos, runs, { speakers: speakersOf });
        expectByChance('executions that were taken over', await takeovers(runs), 3);
        expectByChance(
          'streams closed',
          runs.reduce((sum, { cleanCloses }) => sum + cleanCloses, 0),
          1,
        );
        // What was handed back in good order has lost no worker.
        const lost = (await chaos.rows(ids(runs))).filter(({ losses }) => losses > 0);
        expect(lost.map(({ execution_id }) => execution_id)).toEqual([]);
      }, HANG_MS);
    },
    HANG_MS + 10_000,
  );
});

const takenUp = async (runs: ClientRun[]) =>
  (await chaos.rows(ids(runs))).filter(({ attempt }) => attempt > 0).length;

// Suite `processes`: what it costs to run as several processes, what a worker that is killed costs, and what more workers give.
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { REQUEST_PATH, deployModel } from '../servers.mjs';
import { clockUs } from '../streams.mjs';
import { deploy, readMetric, requestOf, untilEnded } from '../studio.mjs';
import { withUsage } from '../usage.mjs';

/** Each stream has a chunk each 20 ms. */
const DELAY_MS = 20;
/** The clients begin one after the other, over so many ms each; the chunks of all streams are spread, too. */
const RAMP_MS = 8;

/** By the letter of the tables: how many workers beside an api process; none is one process that does all. */
const LAYOUTS = { a: 0, b: 1 };
const LIVE_STREAMS = [20, 100];
const LIVE = { rounds: 3, tokens: 160 };
const QUICK_LIVE = { rounds: 1, tokens: 110 };
const WARM_UP = { seconds: 1 };

const RECOVERED_STREAMS = 20;
const RECOVERED_TOKENS = 175;
/** All executions have begun to speak so long after all of them run, ms. */
const BEFORE_KILL_MS = 500;
const ALL_RUN_LIMIT_MS = 3000;
const POLL_MS = 20;
const RECOVERY = { rounds: 2, locksMs: [5000, 1000] };
const QUICK_RECOVERY = { rounds: 1, locksMs: [1000] };

const WORKERS = [1, 2, 4];
const SCALED_STREAMS = 100;
const SCALED = { rounds: 2, seconds: 1.5, each: 2, executions: 600 };
const QUICK_SCALED = { rounds: 1, seconds: 0.8, each: 1, executions: 200 };
const SCALED_WARM_UP = { seconds: 0.5 };
/** An execution as small as can be, for the throughput of the queue. */
const TINY = 'tiny';
const TINY_AGENT = { agent_id: 'echo', agent_type: 'template', config: { template: '{{ query }}' } };
const ASYNC_PATH = '/api/workflows/execute/async';
const ASKING_CLIENTS = 32;
const ENDED_LIMIT_MS = 30_000;

/** By the name that `--parts` takes. */
export const PARTS = { live: measureLive, recovery: measureRecovery, scaling: measureScaling };

/** @returns `{live, recovery, scaling, faults, others_core_percent}`: a record for each measurement; ms, latencies in µs */
export async function measureProcesses(setup, options, progress) {
  const faults = [];
  const context = { ...progress, faults };
  const measured = { live: [], recovery: [], scaling: [] };
  for (const part of options.parts) measured[part] = await PARTS[part](setup, options, context);
  const { live, scaling } = measured;
  const others = [...live, ...scaling].map(({ usage }) => usage.others_core_percent ?? 0);
  return { ...measured, faults, others_core_percent: Math.max(0, ...others) };
}

/** How long a chunk takes from the upstream to the client, through one process and through two, in turn. */
async function measureLive(setup, { quick, profile }, context) {
  const { rounds, tokens } = quick ? QUICK_LIVE : LIVE;
  const systems = {};
  for (const [letter, workers] of Object.entries(LAYOUTS)) {
    systems[letter] = await startDeployed(setup, workers);
    await load(setup, systems[letter], { streams: 100, ...WARM_UP }, context);
  }
  const records = [];
  for (let round = 1; round <= rounds; round++) {
    for (const streams of LIVE_STREAMS) {
      const letters = Object.keys(LAYOUTS);
      for (const letter of round % 2 === 1 ? letters : letters.toReversed()) {
        context.onProgress(`processes: round ${round}, ${streams} streams, ${letter}`);
        const stream = {
          answer: { tokens, delay: DELAY_MS, stamp: 1 },
          expected: { tokens },
          isStamped: true,
        };
        const extent = { streams, each: 1, ramp: streams * RAMP_MS };
        const { children } = systems[letter];
        const measured = () =>
          withUsage(setup, children, () => load(setup, systems[letter], { ...stream, ...extent }, context));
        const title = `processes-${letter}-${streams}-streams`;
        const folder = round === 1 ? profile : undefined;
        const { result, ...usage } = await withProfiles(children, { folder, title }, measured);
        if (result.latencies.length === 0) context.faults.push('the streams were never all live at once');
        records.push({ layout: letter, streams, round, ...result, usage });
      }
    }
  }
  for (const system of Object.values(systems)) await system.end();
  return records;
}

/** How long the executions of a worker that is killed stand still, with each of the lock's times on new processes. */
async function measureRecovery(setup, { quick }, context) {
  const { rounds, locksMs } = quick ? QUICK_RECOVERY : RECOVERY;
  const records = [];
  for (let round = 1; round <= rounds; round++) {
    for (const lock_ms of locksMs) {
      context.onProgress(`processes: round ${round}, a worker killed, lock of ${lock_ms} ms`);
      const system = await startDeployed(setup, 2, { env: { JOB_LOCK_MS: String(lock_ms) } });
      records.push({ round, lock_ms, ...(await killOne(setup, system, context)) });
      await system.end();
    }
  }
  return records;
}

/** @returns `{executions, standstills}`: how many the killed worker had, and ms from the kill to the next chunk of each */
async function killOne(setup, system, context) {
  const tokens = RECOVERED_TOKENS;
  const stream = { answer: { tokens, delay: DELAY_MS }, expected: { tokens, mayRestart: true } };
  const extent = { streams: RECOVERED_STREAMS, each: 1, ramp: RECOVERED_STREAMS * RAMP_MS };
  const loading = load(setup, system, { ...stream, ...extent }, context);
  loading.catch(() => undefined); // met below
  const running = await untilAllRun(system, RECOVERED_STREAMS);
  await sleep(BEFORE_KILL_MS, undefined, { signal: context.signal });
  const executions = Math.max(...running);
  const killed = clockUs();
  await system.kill(system.workers[running.indexOf(executions)]);
  const { restartedAt } = await loading;
  if (restartedAt.length !== executions)
    context.faults.push(
      `${restartedAt.length} of the ${executions} executions of a killed worker began again`,
    );
  return { executions, standstills: restartedAt.map((at) => (at - killed) / 1000) };
}

/** Waits until the workers run so many executions; resolves with how many each of them runs. */
async function untilAllRun({ workers }, count) {
  const giveUp = performance.now() + ALL_RUN_LIMIT_MS;
  for (;;) {
    const read = ({ url }) => readMetric(url, 'agent_studio_executions_running');
    const running = await Promise.all(workers.map(read));
    if (running.reduce((sum, one) => sum + one, 0) === count) return running;
    if (performance.now() > giveUp)
      throw new Error(`The workers run ${running.join(' and ')} executions, not ${count}.`);
    await sleep(POLL_MS);
  }
}

/** What one api process and more and more workers do in a second; to and fro, so that no number always comes first. */
async function measureScaling(setup, { quick }, context) {
  const { rounds, seconds, each, executions } = quick ? QUICK_SCALED : SCALED;
  const system = await startDeployed(setup, WORKERS[0], { core: setup.allCores });
  await deploy(system.front.url, TINY, TINY_AGENT);
  const cells = [
    { what: 'undelayed', delay: 0, seconds },
    { what: 'delayed', delay: 5, each },
  ];
  const records = [];
  let ended = 0;
  for (let round = 1; round <= rounds; round++) {
    for (const workers of round % 2 === 1 ? WORKERS : WORKERS.toReversed()) {
      await system.setWorkers(workers);
      await load(setup, system, { streams: SCALED_STREAMS, ...SCALED_WARM_UP }, context);
      for (const { what, delay, ...extent } of cells) {
        context.onProgress(`processes: round ${round}, ${workers} workers, ${delay} ms a token`);
        const { result, ...usage } = await withUsage(setup, system.children, () =>
          load(setup, system, { answer: { delay }, streams: SCALED_STREAMS, ...extent }, context),
        );
        records.push({ round, workers, what, count: result.chunks, ms: result.ms, usage });
      }
      context.onProgress(`processes: round ${round}, ${workers} workers, the queue`);
      ended += executions;
      const { result: ms, ...usage } = await withUsage(setup, system.children, () =>
        runTiny(setup, system, { count: executions, ended, context }),
      );
      records.push({ round, workers, what: 'executions', count: executions, ms, usage });
    }
  }
  await system.end();
  return records;
}

/** Begins tiny executions as fast as the api process takes them; ms until all have ended. */
async function runTiny({ load: asking }, { front }, { count, ended, context }) {
  const body = JSON.stringify({ deployment_name: TINY, query: 'Say it.' });
  const begun = performance.now();
  const question = { port: front.port, path: ASYNC_PATH, body, count, clients: ASKING_CLIENTS };
  const { faults } = await asking.ask('ask', question);
  context.faults.push(...faults);
  if (faults.length === 0) {
    const failed = await untilEnded(front.url, TINY, { count: ended, limitMs: ENDED_LIMIT_MS });
    if (failed > 0) context.faults.push(`${failed} tiny executions did not complete`);
  }
  return performance.now() - begun;
}

async function startDeployed(setup, workers, options) {
  const system = await setup.startProcesses(workers, options);
  await deployModel(system.front.url);
  return system;
}

/** Streams through the process in front; what is wrong with them goes to the faults. */
async function load(setup, { front }, { answer, ...extent }, { signal, faults }) {
  signal.throwIfAborted();
  const body = JSON.stringify(requestOf(answer));
  const { faults: counts, ...result } = await setup.load.ask('load', {
    port: front.port,
    path: REQUEST_PATH,
    body,
    ...extent,
  });
  for (const [fault, count] of Object.entries(counts)) faults.push(...Array(count).fill(fault));
  return result;
}

/** Does `work`; a CPU profile of each process goes into the folder, if there is one. */
async function withProfiles(children, { folder, title }, work) {
  if (folder === undefined) return work();
  await Promise.all(children.map((child) => child.ask('startProfile')));
  const result = await work();
  await Promise.all(
    children.map((child) => child.ask('stopProfile', join(folder, `${title}-${child.name}.cpuprofile`))),
  );
  return result;
}

// Suite `readers`: what readers cost that take nothing, because they stopped or because there is nothing to send.
import { setTimeout as sleep } from 'node:timers/promises';
import { begin, cancel, readMetric, untilCompleted, untilMetric } from '../studio.mjs';
import { settledMemory, withPeak, withUsage } from '../usage.mjs';

const OPEN_STREAMS = 'agent_studio_open_streams';
/** The server is given so long to notice that its clients are gone, ms. */
const CLOSE_LIMIT_MS = 20_000;

/** What the end of the work left to do is done then. */
const SETTLE_MS = 1000;

const STALLED = 50;
const BIG = { tokens: 10_000, size: 4096 };
/** The readers come before the text does: what they are handed is live. */
const BIG_WAIT_MS = 1000;
/**
 * The chunks over which the speed of the fast reader counts. Before them the stalled ones are as busy as it is: what their
 * sockets take, some MB each, is sent to them.
 */
const FAST = { from: 2000, until: 5000 };
/** A stalled reader goes on in the end: past all that was under way when it stopped. */
const READ_ON_CHUNKS = 2500;
const PAIRS = 2;
const QUICK_PAIRS = 1;

const IDLE = 2000;
const IDLE_WARM_UP = 200;
/** The idle streams follow so many executions. */
const IDLE_EXECUTIONS = 10;
/** The heartbeat interval of the server: each stream gets one. */
const IDLE_SECONDS = 15;

/** @returns `{stalled, idle, faults, others_core_percent}`; bytes and ms */
export async function measureReaders(setup, options, progress) {
  const faults = [];
  const stalled = await measureStalled(setup, options, { ...progress, faults });
  const idle = await measureIdle(setup, { ...progress, faults });
  const usages = [...stalled.runs, idle].map(({ usage }) => usage.others_core_percent ?? 0);
  return { stalled, idle, faults, others_core_percent: Math.max(...usages) };
}

/** Without and with stalled readers in turn, each time on a new server, as the memory of a used one has a history. */
async function measureStalled(setup, { quick }, { signal, onProgress, faults }) {
  const runs = [];
  for (let pair = 1; pair <= (quick ? QUICK_PAIRS : PAIRS); pair++) {
    for (const readers of pair % 2 === 1 ? [0, STALLED] : [STALLED, 0]) {
      signal.throwIfAborted();
      onProgress(`readers: pair ${pair}, ${readers} stalled`);
      const server = await setup.startServer('a');
      runs.push({ pair, ...(await runBig(setup, server, { readers, faults })) });
      await server.end();
    }
  }
  return { readers: STALLED, characters: BIG.tokens * BIG.size, runs };
}

/** One big execution with a fast reader, and with some that stall: memory, and how fast both went. */
async function runBig(setup, { port, url, child }, { readers, faults }) {
  const ask = async (question, argument) => {
    const answer = await setup.load.ask(question, argument);
    faults.push(...answer.faults);
    return answer;
  };
  const before = await settledMemory(child);
  const { result: usage, peak } = await withPeak(child, () =>
    withUsage(setup, child, async () => {
      const executionId = await begin(url, { ...BIG, wait: BIG_WAIT_MS });
      const begun = performance.now() + BIG_WAIT_MS;
      const stream = { port, tokens: BIG.tokens };
      await ask('hold', { ...stream, executionIds: [executionId], stalls: true, count: readers });
      const [fast, execution_ms] = await Promise.all([
        ask('follow', { ...stream, executionId, ...FAST }),
        untilCompleted(url, executionId).then(() => performance.now() - begun),
      ]);
      return { bytes: fast.bytes, reader_ms: fast.ms, execution_ms };
    }),
  );
  await sleep(SETTLE_MS);
  const after = await settledMemory(child);
  // Had the sockets taken everything, nobody would have stalled.
  const open = await readMetric(url, OPEN_STREAMS);
  if (open !== readers) faults.push(`${open} streams were open while ${readers} were stalled`);
  if (readers > 0) await ask('readOn', { chunks: READ_ON_CHUNKS });
  await ask('release');
  const closed_ms = await untilClosed(url, faults);
  return { readers, before: before.held, peak, after, ...usage.result, usage, closed_ms };
}

/** Streams of executions whose model is silent: memory, what they cost while nothing comes, and that they are let go. */
async function measureIdle(setup, { signal, onProgress, faults }) {
  const server = await setup.startServer('a');
  const { port, url, child } = server;
  const ask = async (question, argument) =>
    faults.push(...Object.values((await setup.load.ask(question, argument)).faults));
  const readHeap = () => readMetric(url, 'nodejs_heap_size_used_bytes');
  const executionIds = [];
  while (executionIds.length < IDLE_EXECUTIONS) executionIds.push(await begin(url, { tokens: 0, open: 1 }));
  onProgress('readers: idle streams, warm-up');
  await ask('hold', { port, executionIds, count: IDLE_WARM_UP });
  await ask('release');
  await untilClosed(url, faults);
  const before = { rss: (await settledMemory(child)).held, heap: await readHeap() };
  signal.throwIfAborted();
  onProgress('readers: idle streams');
  await ask('hold', { port, executionIds, count: IDLE });
  const open = await readMetric(url, OPEN_STREAMS);
  if (open !== IDLE) faults.push(`${open} streams were open while ${IDLE} were idle`);
  await sleep(SETTLE_MS, undefined, { signal });
  const usage = await withUsage(setup, child, () => sleep(IDLE_SECONDS * 1000, undefined, { signal }));
  const during = { rss: await settledMemory(child), heap: await readHeap() };
  await ask('release');
  const closed_ms = await untilClosed(url, faults);
  for (const executionId of executionIds) await cancel(url, executionId);
  await server.end();
  return { streams: IDLE, before, during, usage, closed_ms };
}

/** ms until the server knows of no open stream any more; a fault and null if that takes too long. */
async function untilClosed(url, faults) {
  const ms = await untilMetric(url, OPEN_STREAMS, { value: 0, limitMs: CLOSE_LIMIT_MS });
  if (ms === null) faults.push(`streams were open ${CLOSE_LIMIT_MS / 1000} s after their clients left`);
  return ms;
}

// Suite `batch`: a batch that is read as one stream, compared with as many single streams.
import { AGENT } from '../streams.mjs';
import { REQUEST_PATH } from '../servers.mjs';
import { deploy, post } from '../studio.mjs';
import { settledMemory, withPeak, withUsage } from '../usage.mjs';

const DEPLOYMENT = 'echo';
/** The built-in model repeats it, each word a chunk. */
const QUERY = Array.from({ length: 100 }, (_, index) => `w${String(index).padStart(3, '0')}`).join(' ');
const BATCH_PATH = '/api/workflows/execute/batch/stream';
const ITEMS = 1000;
/** What a server runs before it is measured: both ways, so that all are equally warm. */
const WARM_UP_ITEMS = 300;
/** The clients of single streams connect one after the other, over so many ms for each: a backlog that overflows would cost a second. */
const RAMP_MS = 0.1;
const ROUNDS = 3;

/**
 * `at_once`: streams of as many clients, or the batch's `concurrency`; undefined is its default. Those that are compared
 * have as many executions in the queue and running.
 */
export const CELLS = {
  a: { title: 'batch, concurrency 1,000', at_once: 1000, isBatch: true, other: 'b' },
  b: { title: '1,000 single streams at once', at_once: 1000 },
  c: { title: 'batch, default concurrency', at_once: undefined, isBatch: true, other: 'd' },
  d: { title: '1,000 single streams, 50 at once', at_once: 50 },
};

/** @returns `{items, tokens, records, faults, others_core_percent}`: a record for each measurement; bytes, ms, CPU in µs */
export async function measureBatch(setup, { quick }, { signal, onProgress }) {
  const faults = [];
  const records = [];
  let tokens;
  for (let round = 1; round <= (quick ? 1 : ROUNDS); round++) {
    const letters = Object.keys(CELLS);
    for (const letter of round % 2 === 1 ? letters : letters.toReversed()) {
      signal.throwIfAborted();
      onProgress(`batch: round ${round}, ${CELLS[letter].title}`);
      // A new one each time, as the memory of a used one has a history.
      const server = await setup.startServer('a');
      tokens = await deployEcho(server.url);
      const run = { setup, server, tokens, faults };
      await warmUp(run);
      const before = (await settledMemory(server.child)).held;
      const { result, peak } = await withPeak(server.child, () =>
        withUsage(setup, server.child, () => read(run, CELLS[letter], ITEMS)),
      );
      const { result: load, ...usage } = result;
      const { held } = await settledMemory(server.child);
      await server.end();
      records.push({ letter, round, ...load, usage, before, peak, held });
    }
  }
  const others = records.map(({ usage }) => usage.others_core_percent ?? 0);
  return { items: ITEMS, tokens, records, faults, others_core_percent: Math.max(0, ...others) };
}

/** Deploys one agent that repeats the query; resolves with the chunks of its answer. */
async function deployEcho(url) {
  await deploy(url, DEPLOYMENT, {
    agent_id: AGENT,
    agent_type: 'llm',
    config: { model: 'offline/echo' },
  });
  const request = { deployment_name: DEPLOYMENT, query: QUERY };
  const { usage } = await post(`${url}/api/workflows/execute`, request);
  return usage.output_tokens;
}

async function warmUp(run) {
  await read(run, CELLS.a, WARM_UP_ITEMS);
  await read(run, CELLS.d, WARM_UP_ITEMS);
}

/** Reads so many executions in the way of a cell; what is wrong with them goes to the faults. */
async function read({ setup, server, tokens, faults }, { at_once, isBatch }, items) {
  const request = { deployment_name: DEPLOYMENT };
  const batch = { ...request, concurrency: at_once, items: Array(items).fill({ query: QUERY }) };
  const extent = isBatch
    ? { path: BATCH_PATH, body: batch, streams: 1, each: 1, expected: { tokens, items } }
    : {
        path: REQUEST_PATH,
        body: { ...request, query: QUERY },
        streams: Math.min(items, at_once),
        each: Math.ceil(items / at_once),
        ramp: at_once * RAMP_MS,
        expected: { tokens },
      };
  const { faults: counts, ...result } = await setup.load.ask('load', {
    port: server.port,
    ...extent,
    body: JSON.stringify(extent.body),
  });
  for (const [fault, count] of Object.entries(counts)) faults.push(...Array(count).fill(fault));
  const { chunks, ms, spokeAt } = result;
  return { chunks, ms, spokeAt };
}

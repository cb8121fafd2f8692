// Suite `resume`: how long a client that reconnects waits for its next chunk, near the beginning of a log and far in it.
import { begin, cancel } from '../studio.mjs';
import { withUsage } from '../usage.mjs';

const CURSORS = [10, 1000, 100_000];
/** So many more than the farthest cursor that the server reads as much from the database for each one. */
const TOKENS = 102_000;
const SAMPLES = 40;
const ROUNDS = 5;
const QUICK_ROUNDS = 1;
const WARM_UP_SAMPLES = 20;

/** @returns `{chunks, cursors, rounds: [{state, times}], faults, others_core_percent}`; times in ms, by cursor */
export async function measureResume(setup, { quick }, { signal, onProgress }) {
  const server = await setup.startServer('a');
  onProgress('resume: making the executions');
  const { streams, faults } = await makeExecutions(setup, server);
  const rounds = [];
  const measure = async (samples, round) => {
    for (const [state, stream] of Object.entries(streams)) {
      signal.throwIfAborted();
      onProgress(`resume: round ${round}, ${state} execution`);
      const answer = await setup.load.ask('firstFrames', { ...stream, cursors: CURSORS, samples });
      faults.push(...answer.faults);
      if (round > 0) rounds.push({ state, times: answer.times });
    }
  };
  await measure(WARM_UP_SAMPLES, 0);
  const { others_core_percent } = await withUsage(setup, server.child, async () => {
    for (let round = 1; round <= (quick ? QUICK_ROUNDS : ROUNDS); round++) await measure(SAMPLES, round);
  });
  await cancel(server.url, streams.running.executionId);
  await server.end();
  return { chunks: TOKENS + 2, cursors: CURSORS, rounds, faults, others_core_percent };
}

/** One that has finished, and one that has said as much and goes on in silence. Both are read once, and checked. */
async function makeExecutions({ load }, { port, url }) {
  const make = async (answer) => ({ port, tokens: TOKENS, executionId: await begin(url, answer) });
  const finished = await make({ tokens: TOKENS });
  const running = await make({ tokens: TOKENS, open: 1 });
  const read = await Promise.all([
    load.ask('follow', finished),
    load.ask('follow', { ...running, until: TOKENS + 1 }),
  ]);
  return { streams: { finished, running }, faults: read.flatMap(({ faults }) => faults) };
}

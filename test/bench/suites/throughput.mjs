// Suite `throughput`: what a chunk costs, with each server in turn.
import { join } from 'node:path';
import { REQUEST_PATH, SERVERS } from '../servers.mjs';
import { requestOf } from '../studio.mjs';
import { withUsage } from '../usage.mjs';

/** After this long no further round is begun that would be over too late; ms since the start of this process. */
const BUDGET_MS = 160_000;
const WARM_UP_SECONDS = 2;
const QUICK_WARM_UP_SECONDS = 0.8;
const CELL_WARM_UP = { seconds: 0.2 };
/** Many streams take longer to begin and to end, which is not what is measured. */
const MANY = 50;
const SECONDS = { few: 1, many: 2.5, quick: 0.8 };
/** With a delay each client reads so many streams, one after the other; a stream takes a second and more. */
const DELAYED_STREAMS = { one: 4, more: 2, quick: 1 };

/** Measures every cell with every server in turn, round after round. Stops earlier rather than run for too long. */
export async function measureThroughput(setup, options, { signal, onProgress }) {
  const servers = {};
  for (const letter of options.only) servers[letter] = await setup.startServer(letter);
  const run = { ...setup, servers };
  const extent = { seconds: options.quick ? QUICK_WARM_UP_SECONDS : WARM_UP_SECONDS };
  for (const letter of options.only) await warmUp(run, letter, { streams: 100, delay: 0, extent });
  const records = [];
  let longest = 0;
  for (let round = 1; round <= options.rounds; round++) {
    const roundBegun = performance.now();
    if (roundBegun + longest > BUDGET_MS) break;
    for (const delay of options.delays) {
      for (const streams of options.streams) {
        for (const letter of options.only) {
          signal.throwIfAborted();
          onProgress(`round ${round}: ${streams} streams, ${delay} ms, ${letter}`);
          if (delay === 0 && round === 1) await warmUp(run, letter, { streams, delay, extent: CELL_WARM_UP });
          const profile = round === 1 ? options.profile : undefined;
          const cell = { streams, delay, extent: extentOf(streams, delay, options.quick), round, profile };
          records.push(await measure(run, letter, cell));
        }
      }
    }
    longest = Math.max(longest, performance.now() - roundBegun);
  }
  for (const server of Object.values(servers)) await server.end();
  return records;
}

function extentOf(streams, delay, quick) {
  if (delay > 0) return { each: DELAYED_STREAMS[quick ? 'quick' : streams === 1 ? 'one' : 'more'] };
  if (quick) return { seconds: SECONDS.quick };
  return { seconds: streams < MANY ? SECONDS.few : SECONDS.many };
}

/** @param extent how much is measured: `seconds`, or `each`, the streams that every client reads */
function askForLoad({ servers, load }, letter, { streams, delay, extent }) {
  const body = JSON.stringify(requestOf({ delay }));
  return load.ask('load', { port: servers[letter].port, path: REQUEST_PATH, body, streams, ...extent });
}

/** Streams that aren't measured. Their faults count all the same. */
async function warmUp(run, letter, cell) {
  const { faults } = await askForLoad(run, letter, cell);
  const [fault] = Object.keys(faults);
  if (fault !== undefined) throw new Error(`${SERVERS[letter].title} failed during the warm-up: ${fault}.`);
}

async function measure(run, letter, cell) {
  const { streams, delay, round, profile } = cell;
  const { child } = run.servers[letter];
  if (profile) await child.ask('startProfile');
  const { result, cpu, rss } = await withUsage(run, child, () => askForLoad(run, letter, cell));
  if (profile)
    await child.ask('stopProfile', join(profile, `${letter}-${streams}-streams-${delay}-ms.cpuprofile`));
  return { server: letter, streams, delay, round, ...result, cpu, rss };
}

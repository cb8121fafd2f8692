/*
 * npm run bench [-- options]: what a stream of Agent Studio costs, compared with two servers that do less.
 *
 * All three stream the same 200 chunks of one model answer to the same clients:
 *   a  Agent Studio         POST /api/workflows/execute/stream: one `llm` agent, each chunk committed before it is sent
 *   b  bare SSE             prepared frames written with node:http; no model, no database: the floor
 *   c  bare streamText      the AI SDK's `streamText` in node:http, the same upstream; no database: what one would
 *                           write without Agent Studio, and where nothing can be resumed
 * with an upstream that answers at once ("without delay") and with one that needs 5 ms a token, at 1, 20 and 100 streams
 * at once. Every client asks for its next stream when one ends. Every stream is checked: `started` first, no gap in the
 * sequence, 200 chunks of content, `completed` last. Any fault fails the run (exit code 1); a missed target does not.
 *
 * Each server is a process of its own with the same flags of Node. Where `taskset` exists, the server has a core for
 * itself and everything else (PostgreSQL, upstream, load generator) shares another one. The servers take turns, for
 * some rounds, since machines are noisy: compare figures of one run only, ratios before absolute figures.
 *
 * Columns
 *   chunks/s        content chunks that clients received, median of the rounds
 *   first chunk     ms from the request to the first frame (`started`), p50/p95
 *   first content   ms from the request to the first text of the model, p50/p95: what a user waits for
 *   server          CPU µs of the server per chunk: the figure that other programs on the machine disturb least
 *   PostgreSQL      CPU µs of all PostgreSQL processes per chunk
 *   RSS             MB of the server at the end, the highest of the rounds
 *   core            % of its core that the server used; below 100 at "without delay" something else was the limit
 *   rest            % of a core used by PostgreSQL, upstream and load generator; near 100 they were the limit, as they
 *                   are for `b` without delay, whose chunks/s is therefore a lower bound
 *   others          % of a core used by programs that don't belong to the benchmark; near 0 is what you want
 * Ratios are the median of the rounds' own ratios, with the lowest and the highest in parentheses.
 *
 * Options
 *   --quick           one round, 1 and 100 streams: a first look in less than 40 s (all: less than 3 minutes)
 *   --only a,c        some of the servers
 *   --streams 1,100   some numbers of streams
 *   --delay 0         some delays of the upstream, ms a token
 *   --rounds 3        at most; fewer are run where the time would not suffice
 *   --json FILE       all figures of all rounds
 *   --profile FOLDER  a CPU profile of every server and cell (it slows them down); opens in Chrome's DevTools
 *   --dist FOLDER     a build of Agent Studio other than `dist`
 * Environment: BENCH_DATABASE_URL, a postgres:// URL of a server on which a database may be created; by default
 * PostgreSQL is started in a temporary folder.
 */
import { mkdtemp, mkdir, rm, writeFile } from 'node:fs/promises';
import { cpus, tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { startPostgres } from './postgres.mjs';
import { machineCpu, pin, postgresCpu } from './processes.mjs';
import { judgeTargets, render, summarize } from './report.mjs';
import { REQUEST_PATH, SERVERS, requestBody, startLoad, startUpstream } from './servers.mjs';

/** After this long no further round is begun that would be over too late; ms since the start of this process. */
const BUDGET_MS = 150_000;
const WARM_UP_SECONDS = 2;
const QUICK_WARM_UP_SECONDS = 0.8;
const CELL_WARM_UP_SECONDS = 0.2;
const SECONDS = 2;
const QUICK_SECONDS = 0.8;
/** A stream with a delay takes a second: two of them, one after the other. */
const DELAYED_SECONDS = 1.1;

/** From here on other programs change the figures, first those of few streams. */
const DISTURBED_PERCENT = 15;
const START_TIMEOUT_MS = 30_000;

/** Ends what was started, in reverse order, on every way out. */
class Cleanup {
  ends = [];
  starting = new Set();
  isOver = false;

  /** Makes something that must be ended. Rejects once the benchmark is over, so that nothing more is begun. */
  async own(make, end) {
    if (this.isOver) throw new Error('The benchmark is over.');
    const making = make();
    this.starting.add(making);
    try {
      const made = await making;
      this.ends.push(() => end(made));
      if (this.isOver) throw new Error('The benchmark is over.');
      return made;
    } finally {
      this.starting.delete(making);
    }
  }

  async run() {
    this.isOver = true;
    // What is just being started can be ended only after that.
    await Promise.race([
      Promise.allSettled(this.starting),
      sleep(START_TIMEOUT_MS, undefined, { ref: false }),
    ]);
    for (let end = this.ends.pop(); end; end = this.ends.pop()) {
      await Promise.resolve(end()).catch((error) => console.error(error));
    }
  }
}

function readOptions() {
  const { values } = parseArgs({
    options: {
      quick: { type: 'boolean', default: false },
      only: { type: 'string', default: Object.keys(SERVERS).join() },
      streams: { type: 'string' },
      delay: { type: 'string', default: '0,5' },
      rounds: { type: 'string' },
      json: { type: 'string' },
      profile: { type: 'string' },
      dist: { type: 'string', default: fileURLToPath(new URL('../../dist', import.meta.url)) },
    },
  });
  const numbers = (name, text, least) =>
    text.split(',').map((part) => {
      const value = Number(part);
      if (Number.isInteger(value) && value >= least) return value;
      throw new Error(`--${name} must be whole numbers from ${least} on, separated by commas.`);
    });
  const only = values.only.split(',');
  if (only.some((letter) => !(letter in SERVERS)))
    throw new Error('--only must be of a, b and c, as in "a,c".');
  return {
    quick: values.quick,
    only,
    streams: numbers('streams', values.streams ?? (values.quick ? '1,100' : '1,20,100'), 1),
    delays: numbers('delay', values.delay, 0),
    rounds: numbers('rounds', values.rounds ?? (values.quick ? '1' : '3'), 1)[0],
    json: values.json && resolve(values.json),
    profile: values.profile && resolve(values.profile),
    dist: resolve(values.dist),
  };
}

/** Starts everything that the measurements need. */
async function start(options, { cleanup, cores, onDeath }) {
  const folder = await cleanup.own(
    () => mkdtemp(join(tmpdir(), 'agent-studio-bench-')),
    (path) => rm(path, { recursive: true, force: true }),
  );
  // There is no .env in this folder that Agent Studio could read.
  const common = { cwd: folder, onDeath };
  const launch = (starting) => cleanup.own(starting, ({ child }) => child.end());
  const { dist } = options;
  let postgres;
  if (options.only.includes('a')) {
    const serverUrl = process.env.BENCH_DATABASE_URL || undefined;
    postgres = await cleanup.own(
      () => startPostgres({ dist, folder: join(folder, 'data'), serverUrl }),
      (server) => server.end(),
    );
  }
  const upstream = await launch(() => startUpstream(common));
  const load = await launch(() => startLoad(common));
  const servers = {};
  for (const letter of options.only) {
    const settings = {
      ...common,
      dist,
      core: cores.server,
      upstreamUrl: upstream.url,
      databaseUrl: postgres?.url,
    };
    servers[letter] = await launch(() => SERVERS[letter].start(settings));
  }
  return { servers, upstream: upstream.child, load: load.child, postgres };
}

/** CPU µs so far, and what the server holds of memory. */
async function readUsage({ upstream, load, postgres }, server) {
  const [own, model, client] = await Promise.all([server, upstream, load].map((child) => child.ask('usage')));
  const { user, system } = process.cpuUsage();
  return {
    server: own.cpu,
    postgres: postgresCpu(postgres?.postmaster),
    upstream: model.cpu,
    load: client.cpu + user + system,
    machine: machineCpu(),
    rss: own.rss,
  };
}

function askForLoad(setup, letter, { streams, delay, seconds }) {
  const { port } = setup.servers[letter];
  return setup.load.ask('load', { port, path: REQUEST_PATH, body: requestBody(delay), streams, seconds });
}

/** Streams that aren't measured. Their faults count all the same. */
async function warmUp(setup, letter, cell) {
  const { faults } = await askForLoad(setup, letter, cell);
  const [fault] = Object.keys(faults);
  if (fault !== undefined) throw new Error(`${SERVERS[letter].title} failed during the warm-up: ${fault}.`);
}

async function measure(setup, letter, cell) {
  const { child } = setup.servers[letter];
  if (cell.profile) await child.ask('startProfile');
  const before = await readUsage(setup, child);
  const result = await askForLoad(setup, letter, cell);
  const after = await readUsage(setup, child);
  if (cell.profile) {
    await child.ask(
      'stopProfile',
      join(cell.profile, `${letter}-${cell.streams}-streams-${cell.delay}-ms.cpuprofile`),
    );
  }
  const cpu = {};
  for (const key of ['server', 'postgres', 'upstream', 'load', 'machine']) {
    if (before[key] !== undefined && after[key] !== undefined) cpu[key] = after[key] - before[key];
  }
  const { streams, delay, round } = cell;
  return { server: letter, streams, delay, round, ...result, cpu, rss: after.rss };
}

/** Measures every cell with every server in turn, round after round. Stops earlier rather than run for too long. */
async function measureAll(setup, options, { signal, onCell }) {
  const seconds = options.quick ? QUICK_WARM_UP_SECONDS : WARM_UP_SECONDS;
  for (const letter of options.only) await warmUp(setup, letter, { streams: 100, delay: 0, seconds });
  const records = [];
  let longest = 0;
  for (let round = 1; round <= options.rounds; round++) {
    const roundBegun = performance.now();
    if (roundBegun + longest > BUDGET_MS) break;
    for (const delay of options.delays) {
      for (const streams of options.streams) {
        for (const letter of options.only) {
          signal.throwIfAborted();
          if (delay === 0) await warmUp(setup, letter, { streams, delay, seconds: CELL_WARM_UP_SECONDS });
          const seconds = delay > 0 ? DELAYED_SECONDS : options.quick ? QUICK_SECONDS : SECONDS;
          const profile = round === 1 ? options.profile : undefined;
          records.push(await measure(setup, letter, { streams, delay, seconds, round, profile }));
          onCell(records.at(-1));
        }
      }
    }
    longest = Math.max(longest, performance.now() - roundBegun);
  }
  return records;
}

async function run(options, { cleanup, signal, onDeath }) {
  const cores = pin();
  const notes = [
    cores.reason === undefined
      ? `The server runs on core ${cores.server}; PostgreSQL, upstream and load generator on core ${cores.others}.`
      : `NOT PINNED, since ${cores.reason}: all processes compete for all cores, and "core" and "rest" can exceed 100.`,
  ];
  if (options.profile) {
    await mkdir(options.profile, { recursive: true });
    notes.push(`Profiled: the figures of the first round are too bad. Profiles are in ${options.profile}.`);
  }
  const setup = await start(options, { cleanup, cores, onDeath });
  if (setup.postgres?.note) notes.push(`${setup.postgres.note}.`);
  const showsProgress = process.stderr.isTTY;
  const onCell = ({ server, streams, delay, round }) => {
    if (showsProgress)
      process.stderr.write(`\rround ${round}: ${streams} streams, ${delay} ms, ${server}      `);
  };
  const records = await measureAll(setup, options, { signal, onCell });
  if (showsProgress) process.stderr.write('\r\u001b[K');
  const cells = summarize(records);
  const targets = judgeTargets(cells);
  const others = Math.max(...cells.map((cell) => cell.others_core_percent ?? 0));
  if (others > DISTURBED_PERCENT) {
    notes.push(
      `DISTURBED: other programs used up to ${Math.round(others)} % of a core. Repeat it on a quiet machine.`,
    );
  }
  const machine = {
    node: process.version,
    cpu: cpus()[0]?.model,
    cores: cpus().length,
    pinned: cores.reason === undefined,
  };
  console.log(render({ cells, targets, notes, machine, titles: SERVERS }));
  if (options.json) {
    const figures = {
      measured_at: new Date().toISOString(),
      machine,
      notes,
      targets,
      cells,
      rounds: records,
    };
    await writeFile(options.json, `${JSON.stringify(figures, undefined, 2)}\n`);
  }
  const faults = records
    .flatMap(({ faults }) => Object.values(faults))
    .reduce((sum, count) => sum + count, 0);
  if (faults > 0) throw new Error(`${faults} streams were not what they should be; see above.`);
}

async function main() {
  const cleanup = new Cleanup();
  const stopping = new AbortController();
  const { signal } = stopping;
  const stop = (error) => stopping.abort(error);
  const stopped = new Promise((_, reject) => {
    signal.addEventListener('abort', () => reject(signal.reason));
  });
  for (const name of ['SIGINT', 'SIGTERM', 'SIGHUP']) {
    // The second one ends this process as it is; its children notice that by themselves.
    process.once(name, () => stop(new Error(`Stopped by ${name}.`)));
  }
  try {
    await Promise.race([run(readOptions(), { cleanup, signal, onDeath: stop }), stopped]);
  } catch (error) {
    console.error(error instanceof Error ? error.message : error);
    process.exitCode = 1;
  } finally {
    await cleanup.run();
  }
  // What a stopped run still waits for is of no interest any more.
  process.exit();
}

await main();

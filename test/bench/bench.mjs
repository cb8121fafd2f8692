/*
 * npm run bench [-- options]: what the streams of Agent Studio cost. Five suites, which take less than 13 minutes together.
 * Each one prints its figures, then all targets are judged. Any stream that is not what it should be (`started` first, no
 * gap in the sequence, as many chunks of content as the model said, `completed` last) fails the run (exit code 1); a
 * missed target does not.
 *
 * Each server is a process of its own with the same flags of Node. Where `taskset` exists, the server has a core for
 * itself and everything else (PostgreSQL, upstream, load generator) shares another one. What is compared takes turns,
 * for some rounds, since machines are noisy: compare figures of one run only, ratios before absolute figures. Ratios
 * are the median of the rounds' own ratios, with the lowest and the highest in parentheses.
 *
 * Suite `throughput`: a stream of Agent Studio compared with two servers that do less. All three stream the same 200
 * chunks of one model answer to the same clients:
 *   a  Agent Studio         POST /api/workflows/execute/stream: one `llm` agent, each chunk committed before it is sent
 *   b  bare SSE             prepared frames written with node:http; no model, no database: the floor
 *   c  bare streamText      the AI SDK's `streamText` in node:http, the same upstream; no database: what one would
 *                           write without Agent Studio, and where nothing can be resumed
 * with an upstream that answers at once ("without delay") and with one that needs 5 ms a token, at 1, 20 and 100 streams
 * at once. Every client asks for its next stream when one ends.
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
 *
 * Suite `resume`: GET /api/executions/:id/stream with a Last-Event-ID near the beginning of an execution of more than
 * 100,000 chunks, and far in it, in turn; of one that has finished, and of one that still runs. Each time a new
 * connection, which is closed after the first frame.
 *   after …         ms from connecting to the first whole frame, p50 / p95
 *
 * Suite `readers`: readers that take nothing.
 * 50 of them read the first frame of an execution of 40 MB and stop, while a fast one reads on. A new server with them and
 * one without them, in turn. RSS of the server, in MB more than before:
 *   peak            the most of all moments
 *   after           a second after the end of the execution: much of it is garbage that V8 has not collected yet
 *   held            the same after a collection
 *   execution       s that the execution took
 *   fast reader     MB/s of its stream, from when the others' sockets are full; what one stream is sent each
 *                   STREAM_FLUSH_INTERVAL_MS is limited, so 4.8 MB/s is the most
 * What waits in the kernel for a stalled reader, up to the system's limit for each socket, is not in the RSS.
 * 2,000 idle streams follow executions whose model is silent:
 *   RSS, held       KiB of the server for each of them, before and after a collection, more than before they were opened
 *   heap            the same of `nodejs_heap_size_used_bytes`, after a collection
 *   core            % of a core that the server used during one heartbeat interval; PostgreSQL: that PostgreSQL used
 *   closed after    s from the last client's leaving until `agent_studio_open_streams` is 0
 *
 * Suite `batch`: 1,000 executions of the built-in model, whose answer is a chunk for each word of the query, read by one
 * client as the merged stream of a batch, and as single streams (POST /api/workflows/execute/stream), each read by a client of
 * its own; with a `concurrency` of 1,000 and 1,000 clients at once, and with the default of 50 and 50 clients, who
 * ask for their next stream when one ends. A new server each time, which has run 600 executions, half of them in each way.
 *   chunks/s        of content, from the first request to the last end
 *   first content   ms from the first request to the first text of any execution
 *   half have begun ms from the first request until half of the executions have said something
 *   server          CPU µs of the server per chunk; PostgreSQL: as above; core, rest: as above
 *   peak, held      MB of the server's RSS more than before: the most of all moments, and after the end and a collection
 *
 * Suite `processes`: Agent Studio as several processes on one database. Less than 3 minutes, in three parts:
 * `live`: 20 and 100 streams whose model says 50 chunks a second each, through
 *   a  one process        ROLE=all: what was committed is handed to the readers in memory
 *   b  api + worker       ROLE=api and ROLE=worker: the api process is notified, and reads from the table
 *   p50 / p95       ms from the upstream's writing of a chunk, whose text says when that was, to the client's reading it;
 *                   of the chunks that were written while all streams were live
 *   server          CPU µs per chunk, of both processes together in b; PostgreSQL: as above
 * Here all processes of Agent Studio share the server's core: a and b have the same hardware, so that their difference is
 * what crossing costs and not what another core gives. Where "core" is near 100, the core was full, and the time is that
 * of waiting for it; look at the CPU then.
 * `recovery`: 20 such streams, an api process and two workers, of which the one with the most executions is killed
 * (SIGKILL). New processes each time, with the default of JOB_LOCK_MS and with 1000; pinned like `live`.
 *   s               from the kill until the first new chunk (`restarted`) of each of its executions, p50 and the longest
 * `scaling`: an api process, through which 100 clients read, and 1, 2 and 4 workers, to and fro.
 *   chunks/s        without delay and with 5 ms a token, and times those of 1 worker in the same round
 *   executions/s    tiny ones of a `template` agent, from the first POST execute/async until the last one has ended
 *   servers         % of a core that all processes of Agent Studio used, with 1 / 2 / 4 workers; rest: as above
 * Here they may use all cores, and everything else still shares one of them. On a machine with two cores everything
 * competes for both: there the ratios say how much workers are in each other's way, and nothing about what they give
 * where each one has a core.
 *
 * Options
 *   --suite NAME      some of the suites: throughput, resume, readers, batch, processes, separated by commas
 *   --quick           a first look: one round, `throughput` with 1 and 100 streams; about 4 minutes, `throughput`
 *                     alone less than 40 s; `processes`, with the short JOB_LOCK_MS only, less than 60 s; `batch`
 *                     about 60 s
 *   --json FILE       all figures of all rounds
 *   --dist FOLDER     a build of Agent Studio other than `dist`
 *   --profile FOLDER  a CPU profile of every server and cell of `throughput` and of `live` (it slows them down); opens in
 *                     Chrome's DevTools
 * Options of `throughput`
 *   --only a,c        some of the servers
 *   --streams 1,100   some numbers of streams
 *   --delay 0         some delays of the upstream, ms a token
 *   --rounds 3        at most; fewer are run where the time would not suffice
 * Option of `processes`
 *   --parts live      some of its parts, separated by commas
 * Environment: BENCH_DATABASE_URL, a postgres:// URL of a server on which databases may be created; by default
 * PostgreSQL is started in a temporary folder.
 */
import { mkdtemp, mkdir, rm, writeFile } from 'node:fs/promises';
import { cpus, tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { createDatabase, startPostgres } from './postgres.mjs';
import { pin } from './processes.mjs';
import { judgeTargets, render, summarize, toJson } from './report.mjs';
import { SERVERS, startAgentStudio, startLoad, startUpstream } from './servers.mjs';
import { StudioProcesses } from './studio-processes.mjs';
import { measureBatch } from './suites/batch.mjs';
import { PARTS, measureProcesses } from './suites/processes.mjs';
import { measureReaders } from './suites/readers.mjs';
import { measureResume } from './suites/resume.mjs';
import { measureThroughput } from './suites/throughput.mjs';

/** By the name that `--suite` takes. */
const SUITES = {
  throughput: measureThroughput,
  resume: measureResume,
  readers: measureReaders,
  batch: measureBatch,
  processes: measureProcesses,
};

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
      this.ends.push({ made, end });
      if (this.isOver) throw new Error('The benchmark is over.');
      return made;
    } finally {
      this.starting.delete(making);
    }
  }

  /** Ends one thing before the others. If it is interrupted, it is ended once more. */
  async end(made) {
    const entry = this.ends.find((one) => one.made === made);
    await entry.end(made);
    this.ends = this.ends.filter((one) => one !== entry);
  }

  async run() {
    this.isOver = true;
    // What is just being started can be ended only after that.
    await Promise.race([
      Promise.allSettled(this.starting),
      sleep(START_TIMEOUT_MS, undefined, { ref: false }),
    ]);
    for (const { made, end } of this.ends.toReversed()) {
      await Promise.resolve(end(made)).catch((error) => console.error(error));
    }
  }
}

function readOptions() {
  const { values } = parseArgs({
    options: {
      suite: { type: 'string', default: Object.keys(SUITES).join() },
      quick: { type: 'boolean', default: false },
      only: { type: 'string', default: Object.keys(SERVERS).join() },
      parts: { type: 'string', default: Object.keys(PARTS).join() },
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
  const some = (name, all) => {
    const chosen = values[name].split(',');
    const known = Object.keys(all);
    if (chosen.every((one) => known.includes(one))) return known.filter((one) => chosen.includes(one));
    throw new Error(`--${name} must be of ${known.join(', ')}, separated by commas.`);
  };
  return {
    suites: some('suite', SUITES),
    quick: values.quick,
    only: some('only', SERVERS),
    parts: some('parts', PARTS),
    streams: numbers('streams', values.streams ?? (values.quick ? '1,100' : '1,20,100'), 1),
    delays: numbers('delay', values.delay, 0),
    rounds: numbers('rounds', values.rounds ?? (values.quick ? '1' : '3'), 1)[0],
    json: values.json && resolve(values.json),
    profile: values.profile && resolve(values.profile),
    dist: resolve(values.dist),
  };
}

/**
 * Starts what all suites need; `startServer` starts one of the servers, `startProcesses` Agent Studio with so many workers,
 * each time with a database of its own.
 */
async function start(options, { cleanup, cores, onDeath }) {
  const folder = await cleanup.own(
    () => mkdtemp(join(tmpdir(), 'agent-studio-bench-')),
    (path) => rm(path, { recursive: true, force: true }),
  );
  // There is no .env in this folder that Agent Studio could read.
  const common = { cwd: folder, onDeath };
  const launch = (starting) => cleanup.own(starting, ({ child }) => child.end());
  const { dist, suites, only } = options;
  let postgres;
  if (only.includes('a') || suites.some((suite) => suite !== 'throughput')) {
    const serverUrl = process.env.BENCH_DATABASE_URL || undefined;
    postgres = await cleanup.own(
      () => startPostgres({ dist, folder: join(folder, 'data'), serverUrl }),
      (server) => server.end(),
    );
  }
  const upstream = await launch(() => startUpstream(common));
  const load = await launch(() => startLoad(common));
  const createOwn = () =>
    cleanup.own(
      () => createDatabase(postgres.url),
      (made) => made.end(),
    );
  const startServer = async (letter) => {
    const database = letter === 'a' ? await createOwn() : undefined;
    const settings = { ...common, dist, core: cores.server, upstreamUrl: upstream.url };
    const server = await launch(() => SERVERS[letter].start({ ...settings, databaseUrl: database?.url }));
    const end = async () => {
      await cleanup.end(server);
      if (database) await cleanup.end(database);
    };
    return { ...server, end };
  };
  const startProcesses = async (workers, { env, core = cores.server } = {}) => {
    const database = await createOwn();
    const settings = { ...common, dist, core, env, upstreamUrl: upstream.url, databaseUrl: database.url };
    const startOne = (role) => launch(() => startAgentStudio({ ...settings, role }));
    const endOne = (made) => cleanup.end(made);
    return new StudioProcesses({ startOne, endOne, database }).start(workers);
  };
  const children = { upstream: upstream.child, load: load.child };
  return { startServer, startProcesses, ...children, postgres, allCores: cores.all };
}

/** Runs the suites one after the other; what they measured, by their names. */
async function measure(setup, options, signal) {
  const showsProgress = process.stderr.isTTY;
  const onProgress = (text) => showsProgress && process.stderr.write(`\r${text.padEnd(50)}`);
  const measured = {};
  for (const suite of options.suites) {
    measured[suite] = await SUITES[suite](setup, options, { signal, onProgress });
  }
  if (showsProgress) process.stderr.write('\r\u001b[K');
  return measured;
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
  const summaries = summarize(await measure(setup, options, signal));
  const targets = judgeTargets(summaries);
  for (const [suite, { others_core_percent: others }] of Object.entries(summaries)) {
    if (others <= DISTURBED_PERCENT) continue;
    notes.push(
      `DISTURBED: other programs used up to ${Math.round(others)} % of a core during "${suite}". Repeat it on a quiet machine.`,
    );
  }
  const machine = {
    node: process.version,
    cpu: cpus()[0]?.model,
    cores: cpus().length,
    pinned: cores.reason === undefined,
  };
  const report = { summaries, targets, notes, machine };
  console.log(render(report));
  if (options.json) await writeFile(options.json, `${JSON.stringify(toJson(report), undefined, 2)}\n`);
  const faults = Object.values(summaries)
    .flatMap((summary) => Object.values(summary.faults))
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

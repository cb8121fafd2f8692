// Suite `throughput`: from the figures of all rounds to the tables, ratios and targets.
import {
  countFaults,
  digits,
  divide,
  median,
  pair,
  percent,
  percentile,
  percentiles,
  renderTable,
} from '../figures.mjs';
import { SERVERS } from '../servers.mjs';
import { CHUNKS } from '../streams.mjs';
import { othersCpu } from '../usage.mjs';

/** At 100 streams without delay: times the chunks/s of the bare streamText. */
const THROUGHPUT_TARGET = 1.3;
/** At one stream: ms that the first content may come later than with the bare streamText. */
const DELAY_TARGET_MS = 5;

/**
 * `cells` has one entry for each number of streams, delay and server, from the records of all rounds. Times in ms, CPU in
 * µs per chunk, shares in % of a core; what could not be measured is null. `rounds`: the records, without each stream.
 */
export function summarize(records) {
  const groups = new Map();
  for (const record of records) {
    const key = `${record.server} ${record.streams} ${record.delay}`;
    groups.set(key, [...(groups.get(key) ?? []), record]);
  }
  const cells = [...groups.values()].map(summarizeCell);
  for (const cell of cells) cell.ratios = ratiosOf(cell, cells);
  return {
    cells,
    rounds: records.map(withoutEachStream),
    others_core_percent: Math.max(...cells.map((cell) => cell.others_core_percent ?? 0)),
    faults: countFaults(records.map(({ faults }) => faults)),
  };
}

/** The record of a round with percentiles in place of the times of each stream. */
function withoutEachStream({ firstChunk, firstContent, spokeAt: _spokeAt, ...record }) {
  return { ...record, first_chunk_ms: percentiles(firstChunk), first_content_ms: percentiles(firstContent) };
}

function summarizeCell(rounds) {
  const [{ server, streams, delay }] = rounds;
  const sum = (pick) => rounds.reduce((total, round) => total + pick(round), 0);
  const chunks = sum((round) => round.chunks);
  const us = sum((round) => round.ms) * 1000;
  const cpu = (key) =>
    rounds.every((round) => round.cpu[key] !== undefined) ? sum((round) => round.cpu[key]) : null;
  const perChunk = (key) => divide(cpu(key), chunks);
  const used = {};
  for (const key of ['server', 'postgres', 'upstream', 'load', 'machine']) used[key] = cpu(key);
  const middle = (pick) => median(rounds.map(pick).filter((value) => value !== undefined)) ?? null;
  return {
    server,
    streams,
    delay,
    rounds: rounds.length,
    streams_read: sum((round) => round.finished),
    chunks_per_s: middle(chunksPerSecond),
    chunks_per_s_by_round: rounds.map(chunksPerSecond),
    first_chunk_ms: {
      p50: middle(({ firstChunk }) => percentile(firstChunk, 50)),
      p95: middle(({ firstChunk }) => percentile(firstChunk, 95)),
    },
    first_content_ms: {
      p50: middle(({ firstContent }) => percentile(firstContent, 50)),
      p95: middle(({ firstContent }) => percentile(firstContent, 95)),
    },
    server_cpu_us: perChunk('server'),
    postgres_cpu_us: server === 'a' ? perChunk('postgres') : null,
    rss_mb: Math.max(...rounds.map(({ rss }) => rss)) / 2 ** 20,
    server_core_percent: percent(used.server, us),
    rest_core_percent: percent(used.postgres + used.upstream + used.load, us),
    others_core_percent: percent(othersCpu(used), us),
    faults: countFaults(rounds.map(({ faults }) => faults)),
  };
}

/** What `a` is to `b` and to `c` in the same cell: chunks/s and CPU. */
function ratiosOf(cell, cells) {
  if (cell.server !== 'a') return undefined;
  const ratios = {};
  for (const server of ['b', 'c']) {
    const other = cells.find(
      ({ streams, delay, ...rest }) =>
        rest.server === server && streams === cell.streams && delay === cell.delay,
    );
    if (other === undefined) continue;
    const byRound = cell.chunks_per_s_by_round.map(
      (value, round) => value / other.chunks_per_s_by_round[round],
    );
    ratios[server] = {
      chunks_per_s: median(byRound),
      lowest: Math.min(...byRound),
      highest: Math.max(...byRound),
      server_cpu: divide(cell.server_cpu_us, other.server_cpu_us),
    };
  }
  return ratios;
}

/** The targets, as far as they were measured: `{target, measured, reached}`. */
export function judge({ cells }) {
  const find = (server, streams, delay) =>
    cells.find((cell) => cell.server === server && cell.streams === streams && cell.delay === delay);
  const judged = [];
  const throughput = find('a', 100, 0)?.ratios.c;
  if (throughput !== undefined) {
    const { chunks_per_s, server_cpu } = throughput;
    judged.push({
      target: `100 streams without delay: chunks/s on one core at least ${THROUGHPUT_TARGET} times those of c`,
      measured: `${chunks_per_s.toFixed(2)} times (for each second of CPU: ${digits(divide(1, server_cpu), 2)} times)`,
      reached: chunks_per_s >= THROUGHPUT_TARGET,
    });
  }
  for (const { delay } of cells.filter(({ server, streams }) => server === 'a' && streams === 1)) {
    const own = find('a', 1, delay).first_content_ms.p50;
    const bare = find('c', 1, delay)?.first_content_ms.p50;
    if (own === null || bare === undefined || bare === null) continue;
    judged.push({
      target: `one stream, ${describeDelay(delay)}: first content (p50) at most ${DELAY_TARGET_MS} ms after that of c`,
      measured: `${(own - bare).toFixed(1)} ms (${own.toFixed(1)} and ${bare.toFixed(1)} ms)`,
      reached: own <= bare + DELAY_TARGET_MS,
    });
  }
  return judged;
}

const COLUMNS = [
  ['chunks/s', (cell) => digits(cell.chunks_per_s, 0)],
  ['first chunk ms', (cell) => pair(cell.first_chunk_ms)],
  ['first content ms', (cell) => pair(cell.first_content_ms)],
  ['server µs', (cell) => digits(cell.server_cpu_us, 1)],
  ['PostgreSQL µs', (cell) => digits(cell.postgres_cpu_us, 1)],
  ['RSS MB', (cell) => digits(cell.rss_mb, 0)],
  ['core %', (cell) => digits(cell.server_core_percent, 0)],
  ['rest %', (cell) => digits(cell.rest_core_percent, 0)],
  ['others %', (cell) => digits(cell.others_core_percent, 0)],
];

/** Lines of text. */
export function render({ cells }) {
  const rounds = Math.max(...cells.map((cell) => cell.rounds));
  const lines = [
    `THROUGHPUT: streams of ${CHUNKS} chunks, median of ${rounds} ${rounds === 1 ? 'round' : 'rounds'}`,
  ];
  for (const { delay, streams } of cells.filter(isFirstOfItsTable)) {
    const rows = cells.filter((cell) => cell.delay === delay && cell.streams === streams);
    lines.push('', `${streams === 1 ? 'One stream' : `${streams} streams at once`}, ${describeDelay(delay)}`);
    lines.push(
      ...renderTable([
        ['', ...COLUMNS.map(([name]) => name)],
        ...rows.map((cell) => [
          `${cell.server}  ${SERVERS[cell.server].title}`,
          ...COLUMNS.map(([, show]) => show(cell)),
        ]),
      ]),
    );
    for (const [server, ratio] of rows.flatMap((cell) => Object.entries(cell.ratios ?? {}))) {
      const { chunks_per_s, lowest, highest, server_cpu } = ratio;
      const range = `(${lowest.toFixed(2)} to ${highest.toFixed(2)})`;
      lines.push(
        `  a/${server}: ${chunks_per_s.toFixed(2)} times the chunks/s ${range}, ${digits(server_cpu, 2)} times the CPU`,
      );
    }
    for (const { server, faults } of rows) {
      for (const [fault, count] of Object.entries(faults))
        lines.push(`  FAULT of ${server}, ${count} times: ${fault}`);
    }
  }
  return lines;
}

function isFirstOfItsTable({ delay, streams }, index, cells) {
  return cells.findIndex((cell) => cell.delay === delay && cell.streams === streams) === index;
}

function describeDelay(delay) {
  return delay === 0 ? 'without delay' : `${delay} ms a token`;
}

function chunksPerSecond({ chunks, ms }) {
  return (chunks * 1000) / ms;
}

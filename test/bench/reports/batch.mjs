// Suite `batch`: from the figures of all rounds to the table, the ratios and the targets.
import {
  countEach,
  digits,
  divide,
  median,
  percent,
  percentile,
  renderFaults,
  renderTable,
  spread,
  times,
} from '../figures.mjs';
import { CELLS } from '../suites/batch.mjs';

const MB = 1_000_000;
/** Times the chunks/s of single streams that a batch has at least, and times their CPU at most. */
const SPEED_TARGET = 1;
const CPU_TARGET = 1;

/** Times in ms, CPU in µs per chunk, memory in MB, shares in % of a core; what could not be measured is null. */
export function summarize({ items, tokens, records, others_core_percent, faults }) {
  const rows = records.map(rowOf);
  const cells = Object.keys(CELLS).map((letter) => {
    const own = rows.filter((row) => row.letter === letter);
    const names = Object.keys(own[0]).filter((name) => typeof own[0][name] === 'number' && name !== 'round');
    return {
      letter,
      ...Object.fromEntries(names.map((name) => [name, median(own.map((row) => row[name]))])),
    };
  });
  const ratios = Object.entries(CELLS)
    .filter(([, { other }]) => other !== undefined)
    .map(([letter, { other }]) => ({ letter, other, ...ratiosOf(rows, letter, other) }));
  return { items, tokens, cells, ratios, rounds: rows, others_core_percent, faults: countEach(faults) };
}

function rowOf({ letter, round, chunks, ms, spokeAt, usage, before, peak, held }) {
  const { server, postgres = null, upstream, load } = usage.cpu;
  const us = usage.ms * 1000;
  return {
    letter,
    round,
    chunks_per_s: (chunks * 1000) / ms,
    first_content_ms: spokeAt[0],
    half_begun_ms: percentile(spokeAt, 50),
    server_cpu_us: divide(server, chunks),
    postgres_cpu_us: divide(postgres, chunks),
    peak_growth_mb: (peak - before) / MB,
    held_growth_mb: (held - before) / MB,
    server_core_percent: percent(server, us),
    rest_core_percent: percent(postgres === null ? null : postgres + upstream + load, us),
  };
}

/** What a batch is to single streams, by the rounds' own ratios. */
function ratiosOf(rows, letter, other) {
  const ratio = (name) => {
    const pairs = rows
      .filter((row) => row.letter === letter)
      .map((row) => [row, rows.find((one) => one.letter === other && one.round === row.round)]);
    return spread(pairs.map(([own, single]) => divide(own[name], single[name]) ?? NaN));
  };
  const names = ['chunks_per_s', 'first_content_ms', 'server_cpu_us', 'postgres_cpu_us', 'peak_growth_mb'];
  return Object.fromEntries(names.map((name) => [name, ratio(name)]));
}

/** The targets: `{target, measured, reached}`. */
export function judge({ ratios }) {
  return ratios.flatMap(({ letter, other, chunks_per_s, server_cpu_us }) => [
    {
      target: `${CELLS[letter].title}: at least ${SPEED_TARGET} times the chunks/s of ${CELLS[other].title}`,
      measured: times(chunks_per_s),
      reached: chunks_per_s.median >= SPEED_TARGET,
    },
    {
      target: `${CELLS[letter].title}: at most ${CPU_TARGET} times the server's CPU of ${CELLS[other].title}`,
      measured: times(server_cpu_us),
      reached: server_cpu_us.median <= CPU_TARGET,
    },
  ]);
}

const COLUMNS = [
  ['chunks/s', 'chunks_per_s', 0],
  ['first content ms', 'first_content_ms', 0],
  ['half have begun ms', 'half_begun_ms', 0],
  ['server µs', 'server_cpu_us', 1],
  ['PostgreSQL µs', 'postgres_cpu_us', 1],
  ['peak MB', 'peak_growth_mb', 0],
  ['held MB', 'held_growth_mb', 0],
  ['core %', 'server_core_percent', 0],
  ['rest %', 'rest_core_percent', 0],
];

/** Lines of text. */
export function render({ items, tokens, cells, ratios, rounds, faults }) {
  const count = Math.max(...rounds.map(({ round }) => round));
  return [
    `BATCH: ${digits(items, 0)} executions of ${digits(tokens, 0)} chunks, median of ${count} ${count === 1 ? 'round' : 'rounds'}`,
    '',
    ...renderTable([
      ['', ...COLUMNS.map(([name]) => name)],
      ...cells.map((cell) => [
        `${cell.letter}  ${CELLS[cell.letter].title}`,
        ...COLUMNS.map(([, name, places]) => digits(cell[name], places)),
      ]),
    ]),
    ...ratios.flatMap(({ letter, other, ...ratio }) => [
      `  ${letter}/${other}: chunks/s ${times(ratio.chunks_per_s)}, CPU of the server ${times(ratio.server_cpu_us)}, of PostgreSQL ${times(ratio.postgres_cpu_us)},`,
      `       growth of the RSS ${times(ratio.peak_growth_mb)}, first content ${times(ratio.first_content_ms)}`,
    ]),
    ...renderFaults(faults),
  ];
}

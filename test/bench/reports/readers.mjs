// Suite `readers`: what readers cost that take nothing.
import {
  countEach,
  digits,
  divide,
  median,
  percent,
  renderFaults,
  renderTable,
  spread,
  times,
} from '../figures.mjs';

const MB = 1_000_000;
const KIB = 1024;
/** MB of memory that all stalled readers together may hold. */
const STALLED_TARGET_MB = 64;
/** Of its speed without stalled readers a fast one must keep this much. */
const FAST_TARGET = 0.9;
/** Seconds after which the server must have noticed that its clients are gone. */
const CLOSED_TARGET_S = 10;

/** Memory in MB and KiB, speed in MB/s, shares in % of a core; what could not be measured is null. */
export function summarize({ stalled, idle, others_core_percent, faults }) {
  return {
    stalled: summarizeStalled(stalled),
    idle: summarizeIdle(idle),
    others_core_percent,
    faults: countEach(faults),
  };
}

function summarizeStalled({ readers, characters, runs }) {
  const rows = runs.map((run) => ({
    pair: run.pair,
    readers: run.readers,
    peak_growth_mb: (run.peak - run.before) / MB,
    growth_mb: (run.after.as_is - run.before) / MB,
    held_mb: (run.after.held - run.before) / MB,
    execution_s: run.execution_ms / 1000,
    fast_mb_per_s: run.bytes / run.reader_ms / 1000,
    closed_s: divide(run.closed_ms, 1000),
  }));
  const middleOf = (count) => {
    const own = rows.filter((row) => row.readers === count);
    const keys = ['peak_growth_mb', 'growth_mb', 'held_mb', 'execution_s', 'fast_mb_per_s'];
    return Object.fromEntries(keys.map((key) => [key, median(own.map((row) => row[key]))]));
  };
  const compare = (key, relate) =>
    spread(
      rows
        .filter((row) => row.readers > 0)
        .map((row) => [row, rows.find((one) => one.readers === 0 && one.pair === row.pair)])
        .map(([row, other]) => relate(row[key], other[key])),
    );
  const difference = (own, other) => own - other;
  return {
    readers,
    text_mb: characters / MB,
    without: middleOf(0),
    with: middleOf(readers),
    growth_mb: compare('growth_mb', difference),
    held_mb: compare('held_mb', difference),
    peak_growth_mb: compare('peak_growth_mb', difference),
    fast_ratio: compare('fast_mb_per_s', (own, other) => own / other),
    execution_ratio: compare('execution_s', (own, other) => own / other),
    runs: rows,
  };
}

function summarizeIdle({ streams, before, during, usage, closed_ms }) {
  const perStream = (bytes, of) => (bytes === null || of === null ? null : (bytes - of) / streams / KIB);
  const us = usage.ms * 1000;
  return {
    streams,
    rss_kib_per_stream: perStream(during.rss.as_is, before.rss),
    held_kib_per_stream: perStream(during.rss.held, before.rss),
    heap_kib_per_stream: perStream(during.heap, before.heap),
    rss_before_mb: before.rss / MB,
    rss_mb: during.rss.as_is / MB,
    seconds: usage.ms / 1000,
    server_core_percent: percent(usage.cpu.server, us),
    postgres_core_percent: percent(usage.cpu.postgres ?? null, us),
    closed_s: divide(closed_ms, 1000),
  };
}

/** The targets: `{target, measured, reached}`. */
export function judge({ stalled, idle }) {
  const { readers, held_mb, fast_ratio } = stalled;
  const closed = [...stalled.runs.map((run) => run.closed_s), idle.closed_s];
  const slowest = closed.includes(null) ? null : Math.max(...closed);
  return [
    {
      target: `${readers} stalled readers: less than ${STALLED_TARGET_MB} MB held for them in all`,
      measured: range(held_mb),
      reached: held_mb.median < STALLED_TARGET_MB,
    },
    {
      target: `${readers} stalled readers: a fast one keeps at least ${FAST_TARGET} of its speed`,
      measured: times(fast_ratio),
      reached: fast_ratio.median >= FAST_TARGET,
    },
    {
      target: `clients gone: no open stream after ${CLOSED_TARGET_S} s`,
      measured: slowest === null ? 'some were open for longer' : `${slowest.toFixed(2)} s at most`,
      reached: slowest !== null && slowest <= CLOSED_TARGET_S,
    },
  ];
}

/** Lines of text. */
export function render({ stalled, idle, faults }) {
  const { readers, fast_ratio, execution_ratio } = stalled;
  const row = (title, figures) => [
    title,
    digits(figures.peak_growth_mb, 0),
    digits(figures.growth_mb, 0),
    digits(figures.held_mb, 0),
    digits(figures.execution_s, 1),
    digits(figures.fast_mb_per_s, 2),
  ];
  return [
    `READERS: ${readers} that stop reading, and a fast one, of an execution of ${digits(stalled.text_mb, 0)} MB of text`,
    '',
    ...renderTable([
      ['', 'peak MB', 'after MB', 'held MB', 'execution s', 'fast reader MB/s'],
      row('without them', stalled.without),
      row(`with ${readers}`, stalled.with),
    ]),
    `  difference: peak ${range(stalled.peak_growth_mb)}, after ${range(stalled.growth_mb)}, held ${range(stalled.held_mb)}`,
    `  the fast reader has ${times(fast_ratio)} its speed, the execution takes ${times(execution_ratio)} as long`,
    '',
    ...renderTable([
      ['', 'RSS KiB each', 'held KiB each', 'heap KiB each', 'core %', 'PostgreSQL %', 'closed after s'],
      [
        `${digits(idle.streams, 0)} idle streams`,
        digits(idle.rss_kib_per_stream, 1),
        digits(idle.held_kib_per_stream, 1),
        digits(idle.heap_kib_per_stream, 1),
        digits(idle.server_core_percent, 1),
        digits(idle.postgres_core_percent, 1),
        digits(idle.closed_s, 2),
      ],
    ]),
    ...renderFaults(faults),
  ];
}

function range({ median: middle, lowest, highest }) {
  return `${digits(middle, 0)} MB (${digits(lowest, 0)} to ${digits(highest, 0)})`;
}

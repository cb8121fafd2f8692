// Suite `processes`: what it costs to run as several processes.
import {
  countEach,
  digits,
  divide,
  median,
  pair,
  percent,
  percentile,
  percentiles,
  renderFaults,
  renderTable,
  spread,
  times,
} from '../figures.mjs';

const TITLES = {
  undelayed: 'chunks/s, without delay',
  delayed: 'chunks/s, 5 ms a token',
  executions: 'executions/s, tiny ones',
};
const LAYOUTS = { a: 'one process', b: 'api + worker' };
/** ms that a chunk may come later through two processes than through one, at the median of its streams. */
const CROSSING_TARGET_MS = 10;
/** Seconds beyond the lock's time until the executions of a killed worker go on. */
const RECOVERY_TARGET_S = 3;

/** Times in ms, of recovery in s, CPU in µs per chunk, shares in % of a core; what could not be measured is null. */
export function summarize({ live, recovery, scaling, others_core_percent, faults }) {
  return {
    live: groupBy(live, ({ streams }) => streams).map(summarizeLive),
    recovery: groupBy(recovery, ({ lock_ms }) => lock_ms).map(summarizeRecovery),
    scaling: groupBy(scaling, ({ what }) => what).map(summarizeScaling),
    others_core_percent,
    faults: countEach(faults),
  };
}

function groupBy(records, keyOf) {
  const groups = new Map();
  for (const record of records) groups.set(keyOf(record), [...(groups.get(keyOf(record)) ?? []), record]);
  return [...groups.values()];
}

/** The two layouts at one number of streams; `b` compared with `a` of the same round. */
function summarizeLive(records) {
  const rounds = records.map(({ latencies, layout, round, streams, chunks, ms, usage }) => {
    const { p50, p95 } = percentiles(latencies);
    const { cpu } = usage;
    const us = usage.ms * 1000;
    return {
      layout,
      round,
      streams,
      samples: latencies.length,
      chunks_per_s: (chunks * 1000) / ms,
      p50_ms: p50 / 1000,
      p95_ms: p95 / 1000,
      server_cpu_us: divide(cpu.server, chunks),
      postgres_cpu_us: divide(cpu.postgres ?? null, chunks),
      server_core_percent: percent(cpu.server, us),
      rest_core_percent: percent((cpu.postgres ?? 0) + cpu.upstream + cpu.load, us),
      others_core_percent: usage.others_core_percent,
    };
  });
  const own = (layout) => rounds.filter((row) => row.layout === layout);
  const layouts = Object.keys(LAYOUTS).map((layout) => ({ layout, ...middles(own(layout)) }));
  const pairs = own('b').map((row) => [row, own('a').find(({ round }) => round === row.round)]);
  const compare = (key, relate) => spread(pairs.map(([row, other]) => relate(row[key], other[key])));
  const difference = (one, other) => one - other;
  return {
    streams: records[0].streams,
    layouts,
    difference_ms: { p50: compare('p50_ms', difference), p95: compare('p95_ms', difference) },
    ratios: {
      p50: compare('p50_ms', divide),
      p95: compare('p95_ms', divide),
      server_cpu: compare('server_cpu_us', divide),
      postgres_cpu: compare('postgres_cpu_us', divide),
    },
    rounds,
  };
}

/** The medians of all figures of the rounds. */
function middles(rows) {
  const { layout: _, round: __, ...figures } = rows[0];
  return Object.fromEntries(
    Object.keys(figures).map((key) => [key, median(rows.map((row) => row[key])) ?? null]),
  );
}

function summarizeRecovery(records) {
  const seconds = records.flatMap(({ standstills }) => standstills).map((ms) => ms / 1000);
  return {
    lock_ms: records[0].lock_ms,
    kills: records.length,
    executions: seconds.length,
    p50_s: percentile(seconds, 50) ?? null,
    highest_s: seconds.length === 0 ? null : Math.max(...seconds),
    rounds: records,
  };
}

/** What so many workers do in a second, and how often they do what one does in the same round. */
function summarizeScaling(records) {
  const rounds = records.map(({ usage, ms, count, ...record }) => {
    const us = usage.ms * 1000;
    const { server, postgres, upstream, load } = usage.cpu;
    return {
      ...record,
      per_s: (count * 1000) / ms,
      server_core_percent: percent(server, us),
      rest_core_percent: percent((postgres ?? 0) + upstream + load, us),
      others_core_percent: usage.others_core_percent,
    };
  });
  const one = (round) => rounds.find((row) => row.workers === 1 && row.round === round);
  const workers = groupBy(rounds, (row) => row.workers).map((rows) => ({
    workers: rows[0].workers,
    per_s: median(rows.map(({ per_s }) => per_s)),
    ratio: spread(rows.map((row) => row.per_s / one(row.round).per_s)),
    server_core_percent: median(rows.map((row) => row.server_core_percent)),
    rest_core_percent: median(rows.map((row) => row.rest_core_percent)),
  }));
  return { what: records[0].what, workers, rounds };
}

/** The targets: `{target, measured, reached}`. */
export function judge({ live, recovery }) {
  return [
    ...live.map(({ streams, difference_ms: { p50 } }) => ({
      target: `${streams} streams, one core: chunks through two processes come (p50) at most ${CROSSING_TARGET_MS} ms later`,
      measured: milliseconds(p50),
      reached: p50.median <= CROSSING_TARGET_MS,
    })),
    ...recovery.map(({ lock_ms, highest_s }) => {
      const most = lock_ms / 1000 + RECOVERY_TARGET_S;
      return {
        target: `a worker killed, JOB_LOCK_MS=${lock_ms}: its executions go on within ${most} s`,
        measured: highest_s === null ? 'none went on' : `${digits(highest_s, 1)} s at most`,
        reached: highest_s !== null && highest_s <= most,
      };
    }),
  ];
}

/** Lines of text. */
export function render({ live, recovery, scaling, faults }) {
  return [
    'PROCESSES: what it costs to run as several of them',
    ...(live.length > 0 ? renderLive(live) : []),
    ...(recovery.length > 0 ? renderRecovery(recovery) : []),
    ...(scaling.length > 0 ? renderScaling(scaling) : []),
    ...renderFaults(faults),
  ];
}

function renderLive(live) {
  const rounds = Math.max(...live[0].rounds.map(({ round }) => round));
  const lines = [];
  for (const { streams, layouts, difference_ms, ratios } of live) {
    lines.push(
      '',
      `${streams} live streams of 50 chunks/s: ms from the upstream to the client, median of ${rounds} ${rounds === 1 ? 'round' : 'rounds'}`,
    );
    lines.push(
      ...renderTable([
        ['', 'p50 / p95 ms', 'server µs', 'PostgreSQL µs', 'core %', 'rest %', 'others %'],
        ...layouts.map((row) => [
          `${row.layout}  ${LAYOUTS[row.layout]}`,
          pair({ p50: row.p50_ms, p95: row.p95_ms }),
          digits(row.server_cpu_us, 1),
          digits(row.postgres_cpu_us, 1),
          digits(row.server_core_percent, 0),
          digits(row.rest_core_percent, 0),
          digits(row.others_core_percent, 0),
        ]),
      ]),
      `  b-a: p50 ${milliseconds(difference_ms.p50)}, p95 ${milliseconds(difference_ms.p95)}`,
      `  b/a: p50 ${times(ratios.p50)}, p95 ${times(ratios.p95)}`,
      `       CPU of the servers ${times(ratios.server_cpu)}, of PostgreSQL ${times(ratios.postgres_cpu)}`,
    );
  }
  return lines;
}

function renderRecovery(recovery) {
  return [
    '',
    'One of two workers killed: s until its executions go on',
    ...renderTable([
      ['', 'executions', 'p50', 'at most'],
      ...recovery.map(({ lock_ms, executions, p50_s, highest_s }) => [
        `JOB_LOCK_MS=${lock_ms}`,
        digits(executions, 0),
        digits(p50_s, 1),
        digits(highest_s, 1),
      ]),
    ]),
  ];
}

function renderScaling(scaling) {
  const counts = scaling[0].workers.map(({ workers }) => workers);
  return [
    '',
    'An api process and several workers, and times what one worker does in the same round',
    ...renderTable([
      [
        '',
        ...counts.flatMap((count) => (count === 1 ? ['1 worker'] : [`${count} workers`, 'times'])),
        'servers %',
        'rest %',
      ],
      ...scaling.map(({ what, workers }) => [
        TITLES[what],
        ...workers.flatMap(({ workers: count, per_s, ratio }) => [
          digits(per_s, 0),
          ...(count === 1 ? [] : [range(ratio, 2)]),
        ]),
        workers.map((row) => digits(row.server_core_percent, 0)).join(' / '),
        workers.map((row) => digits(row.rest_core_percent, 0)).join(' / '),
      ]),
    ]),
  ];
}

function milliseconds(values) {
  return `${range(values, 1)} ms`;
}

function range({ median: middle, lowest, highest }, count) {
  return `${digits(middle, count)} (${digits(lowest, count)} to ${digits(highest, count)})`;
}

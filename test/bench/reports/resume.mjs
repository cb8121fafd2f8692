// Suite `resume`: how the time to the first frame depends on where a client goes on.
import {
  countEach,
  digits,
  pair,
  percentile,
  percentiles,
  renderFaults,
  renderTable,
  spread,
  times,
} from '../figures.mjs';

/** Times the time near the beginning of the log that the first frame may take far in it. */
const RESUME_TARGET = 2;

/** For each state of an execution the ms to the first frame by cursor, and the ratio of the farthest to the nearest. */
export function summarize({ chunks, cursors, rounds, others_core_percent, faults }) {
  const states = [...new Set(rounds.map(({ state }) => state))].map((state) => {
    const own = rounds.filter((round) => round.state === state);
    const p50 = (round, cursor) => percentile(round.times[cursor], 50);
    const first_frame_ms = {};
    for (const cursor of cursors) {
      const all = own.flatMap((round) => round.times[cursor]);
      first_frame_ms[cursor] = { samples: all.length, ...percentiles(all) };
    }
    const ratio = spread(own.map((round) => p50(round, cursors.at(-1)) / p50(round, cursors[0])));
    const byRound = own.map(({ times: ms }) =>
      Object.fromEntries(cursors.map((cursor) => [cursor, percentiles(ms[cursor])])),
    );
    return { state, first_frame_ms, ratio, first_frame_ms_by_round: byRound };
  });
  return { chunks, cursors, states, others_core_percent, faults: countEach(faults) };
}

/** The targets: `{target, measured, reached}`. */
export function judge({ cursors, states }) {
  const [near, far] = [digits(cursors[0], 0), digits(cursors.at(-1), 0)];
  return states.map(({ state, ratio }) => ({
    target: `${state} execution: first frame after chunk ${far} (p50) in at most ${RESUME_TARGET} times what it takes after chunk ${near}`,
    measured: times(ratio),
    reached: ratio.median <= RESUME_TARGET,
  }));
}

/** Lines of text. */
export function render({ chunks, cursors, states, faults }) {
  const { samples } = states[0].first_frame_ms[cursors[0]];
  return [
    `RESUME: an execution of ${digits(chunks, 0)} chunks; ms from connecting to the first frame, p50 / p95 of ${samples} connections`,
    '',
    ...renderTable([
      ['', ...cursors.map((cursor) => `after ${digits(cursor, 0)}`), 'last to first'],
      ...states.map(({ state, first_frame_ms, ratio }) => [
        `${state} execution`,
        ...cursors.map((cursor) => pair(first_frame_ms[cursor])),
        times(ratio),
      ]),
    ]),
    ...renderFaults(faults),
  ];
}

import { describe, expect, it } from '@jest/globals';
import fc from 'fast-check';
import { GRANULARITIES } from '../../src/database/entities/execution-statistics.entity.js';
import { segmentsOf, toPeriod } from '../../src/deployments/statistics.period.js';

const NOW = Date.parse('2026-06-15T12:34:56.789Z');
const WIDTH = { minute: 60_000, hour: 3_600_000, day: 86_400_000 };

describe('the segments of a period', () => {
  const moment = fc.integer({ min: NOW - 100 * WIDTH.day, max: NOW + WIDTH.day });
  const anyPeriod = fc.record({
    bucket: fc.constantFrom(...GRANULARITIES),
    from: fc.option(moment, { nil: undefined }),
    to: fc.option(moment, { nil: undefined }),
  });

  it('cover it once and nothing else, in whole minutes, hours and days, and never cross a step of the series', () => {
    fc.assert(
      fc.property(anyPeriod, ({ bucket, from, to }) => {
        const width = WIDTH[bucket];
        fc.pre(from === undefined || from < (to ?? NOW));
        fc.pre(from === undefined || ((to ?? NOW) - from) / width < 1490);
        const text = (at: number | undefined) => (at === undefined ? undefined : new Date(at).toISOString());
        const now = new Date(NOW);
        const period = toPeriod({ bucket, from: text(from), to: text(to) }, now);
        const segments = segmentsOf(period, bucket, now);
        expect(segments[0]?.first).toBe(from ?? -Infinity);
        expect(segments.at(-1)?.past).toBe(to ?? Infinity);
        segments.forEach(({ granularity, first, past }, index) => {
          expect(first).toBeLessThan(past);
          if (index > 0) expect(first).toBe(segments[index - 1]?.past);
          if (granularity === null) return;
          const isWhole = (at: number) => !Number.isFinite(at) || at % WIDTH[granularity] === 0;
          expect(isWhole(first) && isWhole(past)).toBe(true);
          if (past > (period.starts[0] ?? 0)) expect(WIDTH[granularity]).toBeLessThanOrEqual(width);
        });
        // Single executions are read of less than a minute at each end, or where minutes are not kept any more.
        const kept = NOW - 33 * WIDTH.day;
        const single = segments.filter(({ granularity, first }) => granularity === null && first > kept);
        for (const { first, past } of single) expect(past - first).toBeLessThan(WIDTH.minute);
        expect(single.length).toBeLessThanOrEqual(2);
      }),
    );
  });
});

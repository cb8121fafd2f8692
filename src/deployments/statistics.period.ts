import { GRANULARITIES } from '../database/entities/execution-statistics.entity.js';
import type { Granularity } from '../database/entities/execution-statistics.entity.js';
import { AppError } from '../errors.js';
import type { StatisticsQueryDto } from './deployments.dto.js';
import { MINUTES_KEPT_DAYS } from './roll-ups.statements.js';

const MOST_STEPS = 1500;
const DEFAULT_STEPS = 60;
/** Every day of UTC has as many: leap seconds are not counted (POSIX, "Seconds Since the Epoch"). */
const WIDTH_MS: Record<Granularity, number> = { minute: 60_000, hour: 3_600_000, day: 86_400_000 };

/** Which executions are counted, and the starts of the series' steps in ms since 1970, oldest first. */
export interface Period {
  from?: Date;
  to?: Date;
  starts: number[];
}

/** A part of a period, ms since 1970, without its end, and what it is read from: without a granularity the executions themselves. */
export interface Segment {
  granularity: Granularity | null;
  first: number;
  past: number;
}

/** What a query asks for. Throws `validation_failed` for a period that is empty or has too many steps. */
export function toPeriod(query: StatisticsQueryDto, now: Date): Period {
  const from = query.from === undefined ? undefined : new Date(query.from);
  const to = query.to === undefined ? undefined : new Date(query.to);
  const step = WIDTH_MS[query.bucket];
  // The end of a period does not belong to it, the present moment does.
  const last = Math.floor((to ? to.getTime() - 1 : now.getTime()) / step) * step;
  const first = from ? Math.floor(from.getTime() / step) * step : last - (DEFAULT_STEPS - 1) * step;
  if (from && from >= (to ?? now)) refuse('from', `must be before ${to ? 'to' : 'now'}`);
  const count = (last - first) / step + 1;
  if (count > MOST_STEPS) {
    const advice = 'Choose a longer bucket or a shorter period';
    refuse('bucket', `gives ${count} steps in this period, and ${MOST_STEPS} are possible. ${advice}`);
  }
  return { from, to, starts: Array.from({ length: count }, (_, index) => first + index * step) };
}

function refuse(parameter: string, detail: string): never {
  throw new AppError('validation_failed', `${parameter} ${detail}.`, {
    faults: [{ pointer: `/${parameter}`, detail }],
  });
}

/**
 * The segments of a period, which don't overlap: days before the series, whole steps in it, hours and minutes where a part is
 * left over, and executions where not even a minute is whole, or minutes are not kept any more.
 */
export function segmentsOf(
  { from, to, starts: [seriesFrom = 0] }: Period,
  bucket: Granularity,
  now: Date,
): Segment[] {
  const begin = from?.getTime() ?? -Infinity;
  const end = to?.getTime() ?? Infinity;
  const minutesFrom = startOf('hour', now.getTime() - (MINUTES_KEPT_DAYS - 1) * WIDTH_MS.day);
  const coarsest = GRANULARITIES.indexOf(bucket) + 1;
  return [
    ...cover({ first: begin, past: Math.min(seriesFrom, end) }, [...GRANULARITIES]),
    ...cover({ first: Math.max(begin, seriesFrom), past: end }, GRANULARITIES.slice(0, coarsest)),
  ].flatMap((segment) => withoutOldMinutes(segment, minutesFrom));
}

function cover({ first, past }: { first: number; past: number }, granularities: Granularity[]): Segment[] {
  if (first >= past) return [];
  const finer = granularities.slice(0, -1);
  const granularity = granularities.at(-1);
  if (granularity === undefined) return [{ granularity: null, first, past }];
  const whole = { first: -startOf(granularity, -first), past: startOf(granularity, past) };
  if (whole.first >= whole.past) return cover({ first, past }, finer);
  return [
    ...cover({ first, past: whole.first }, finer),
    { granularity, ...whole },
    ...cover({ first: whole.past, past }, finer),
  ];
}

function startOf(granularity: Granularity, moment: number): number {
  return Math.floor(moment / WIDTH_MS[granularity]) * WIDTH_MS[granularity];
}

function withoutOldMinutes(segment: Segment, minutesFrom: number): Segment[] {
  const { granularity, first, past } = segment;
  if (granularity !== 'minute' || first >= minutesFrom) return [segment];
  const old: Segment = { granularity: null, first, past: Math.min(past, minutesFrom) };
  return past <= minutesFrom ? [old] : [old, { granularity, first: minutesFrom, past }];
}

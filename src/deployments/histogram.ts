/**
 * Histograms of durations with bins that widen with the value, so that every percentile has the same relative error (DDSketch:
 * Masson, Rim, Lee, VLDB 2019). Bin `b` holds what is above {@link GROWTH}^(b-1) and at most {@link GROWTH}^b ms; bin -1 holds 0.
 * A day has 457 bins.
 */

/** How far a percentile may be from the exact one, as a part of it. */
export const RELATIVE_ERROR = 0.02;

const GROWTH = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR);
const EMPTY_BIN = -1;

/** SQL of the bin of a duration in ms, a whole number. */
export function binOf(durationMs: string): string {
  return `(CASE WHEN ${durationMs} < 1 THEN ${EMPTY_BIN} ELSE ceil(ln(${durationMs}::float8) / ${Math.log(GROWTH)})::int END)`;
}

/** SQL of the value of a bin in ms: from there both of its ends are equally far, as a part of themselves. */
function valueOf(bin: string): string {
  return `(CASE WHEN ${bin} < 0 THEN 0 ELSE ${2 / (1 + GROWTH)} * ${GROWTH}::float8 ^ ${bin} END)`;
}

/**
 * SQL aggregate: some quantiles as an array, from rows that each have a `bin`, `upto` (how many values are in this bin and the
 * lower ones) and `total` (how many in all). Between two values it interpolates as `percentile_cont` does.
 */
export function quantiles(of: readonly number[]): string {
  const at = of.map((quantile) => {
    const position = `${quantile} * (max(total) - 1)`;
    const low = lowest(`floor(${quantile} * (total - 1))`);
    const high = lowest(`ceil(${quantile} * (total - 1))`);
    return `${low} + (${high} - ${low}) * (${position} - floor(${position}))`;
  });
  return `ARRAY[${at.join(', ')}]::float8[]`;
}

/** The value of the bin that holds the value at `rank`, counted from 0. */
function lowest(rank: string): string {
  return valueOf(`(min(bin) FILTER (WHERE upto > ${rank}))`);
}

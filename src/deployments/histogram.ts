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
 * SQL of a subquery: some quantiles of all that is in the bins, as an array; null of nothing. Between two values it interpolates as
 * `percentile_cont` does.
 *
 * @param counted FROM item with a `bin` and its `count`, perhaps several times
 */
export function quantiles(of: readonly number[], counted: string): string {
  const at = of.map((quantile) => {
    const position = `${quantile} * (upto[cardinality(upto)] - 1)`;
    const [low, high] = [valueAt(`floor(${position})`), valueAt(`ceil(${position})`)];
    return `${low} + (${high} - ${low}) * (${position} - floor(${position}))`;
  });
  return `(
    SELECT ARRAY[${at.join(', ')}]
      FROM (SELECT array_agg(bin ORDER BY bin) AS bins, array_agg(upto ORDER BY bin) AS upto
              FROM (SELECT bin, (sum(count) OVER (ORDER BY bin))::float8 AS upto
                      FROM (SELECT bin, sum(count)::float8 AS count FROM ${counted} GROUP BY bin) AS summed) AS ranked
            HAVING count(*) > 0) AS histogram)`;
}

/** The value at a rank, counted from 0: that of the first bin up to which there are more. */
function valueAt(rank: string): string {
  return valueOf(`bins[width_bucket(${rank}, upto) + 1]`);
}

// Statistics and how figures are written.

/** Of no values: undefined. */
export function median(values) {
  if (values.length === 0) return undefined;
  const sorted = values.toSorted((one, other) => one - other);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** Nearest rank; undefined without values. */
export function percentile(values, rank) {
  return values.toSorted((one, other) => one - other)[Math.ceil((rank / 100) * values.length) - 1];
}

export function percentiles(values) {
  return { p50: percentile(values, 50), p95: percentile(values, 95) };
}

/** Median, lowest and highest of the rounds' own values. */
export function spread(values) {
  return { median: median(values), lowest: Math.min(...values), highest: Math.max(...values) };
}

/** Adds up counts of the same faults. */
export function countFaults(counts) {
  const sums = {};
  for (const [fault, count] of counts.flatMap((each) => Object.entries(each)))
    sums[fault] = (sums[fault] ?? 0) + count;
  return sums;
}

/** How often each one is in the list. */
export function countEach(faults) {
  return countFaults(faults.map((fault) => ({ [fault]: 1 })));
}

export function divide(value, by) {
  return value === null || by === null || by === 0 ? null : value / by;
}

export function percent(value, of) {
  return value === null ? null : (value / of) * 100;
}

/** What could not be measured is a dash. */
export function digits(value, count) {
  if (value === null || value === undefined || Number.isNaN(value)) return '-';
  return value.toLocaleString('en-US', { minimumFractionDigits: count, maximumFractionDigits: count });
}

export function pair({ p50, p95 }) {
  return `${digits(p50, 1)} / ${digits(p95, 1)}`;
}

/** A ratio of {@link spread}: `1.02 times (0.98 to 1.07)`. */
export function times({ median: middle, lowest, highest }) {
  return `${digits(middle, 2)} times (${digits(lowest, 2)} to ${digits(highest, 2)})`;
}

/** Lines of a table: its head, then its rows; the first column is on the left. */
export function renderTable(rows) {
  const widths = rows[0].map((_, column) => Math.max(...rows.map((row) => row[column].length)));
  return rows.map((row) => {
    const [title, ...values] = row.map((text, column) =>
      column === 0 ? text.padEnd(widths[column]) : text.padStart(widths[column]),
    );
    return `  ${title}  ${values.join('  ')}`;
  });
}

/** Lines for the faults of a suite. */
export function renderFaults(faults) {
  return Object.entries(faults).map(([fault, count]) => `  FAULT, ${count} times: ${fault}`);
}

// The whole report: what each suite measured, summarized, judged and written.
import * as batch from './reports/batch.mjs';
import * as processes from './reports/processes.mjs';
import * as readers from './reports/readers.mjs';
import * as resume from './reports/resume.mjs';
import * as throughput from './reports/throughput.mjs';

const REPORTS = { throughput, resume, readers, batch, processes };

/** From what the suites measured, by their names, to the figures that are shown; see each one's `summarize`. */
export function summarize(measured) {
  const summaries = Object.entries(measured).map(([suite, result]) => [
    suite,
    REPORTS[suite].summarize(result),
  ]);
  return Object.fromEntries(summaries);
}

/** The targets of all suites that ran, as far as they were measured: `{target, measured, reached}`. */
export function judgeTargets(summaries) {
  return Object.entries(summaries).flatMap(([suite, summary]) => REPORTS[suite].judge(summary));
}

/** The whole report as text. */
export function render({ summaries, targets, notes, machine }) {
  const lines = [`Node ${machine.node}, ${machine.cores} cores, ${machine.cpu}.`, ...notes];
  for (const [suite, summary] of Object.entries(summaries)) lines.push('', ...REPORTS[suite].render(summary));
  if (targets.length > 0) lines.push('', 'Targets');
  for (const { target, measured, reached } of targets) {
    lines.push(`  ${reached ? 'reached    ' : 'NOT reached'}  ${target}: ${measured}`);
  }
  return lines.join('\n');
}

/** All figures; those of `throughput` are `cells` and `rounds`. */
export function toJson({ summaries, targets, notes, machine }) {
  const { throughput: chunks, ...others } = summaries;
  const measured_at = new Date().toISOString();
  return { measured_at, machine, notes, targets, cells: chunks?.cells, rounds: chunks?.rounds, ...others };
}

import { readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, relative } from 'node:path';

/**
 * Ends a run's summary with the tests that showed nothing, which `inconclusive()` has told of. `INCONCLUSIVE_LOG` names the
 * file that they are kept in, one JSON object a line; without it they are in a temporary one.
 */
export default class InconclusiveReporter {
  #temporary = process.env.INCONCLUSIVE_LOG
    ? undefined
    : join(tmpdir(), `agent-studio-inconclusive-${process.pid}.jsonl`);

  onRunStart() {
    process.env.INCONCLUSIVE_LOG ??= this.#temporary;
    writeFileSync(process.env.INCONCLUSIVE_LOG, '');
  }

  onRunComplete() {
    const told = readInconclusive(process.env.INCONCLUSIVE_LOG);
    if (this.#temporary) rmSync(this.#temporary);
    if (told.length === 0) return;
    const lines = told.map(({ file, test, reason }) => `  ${relative('', file)} › ${test}\n    ${reason}`);
    process.stderr.write(`\nInconclusive: ${told.length}\n${lines.join('\n')}\n`);
  }
}

/** What a run has told of, as `{ file, test, reason }`. */
export function readInconclusive(log) {
  return readFileSync(log, 'utf8')
    .split('\n')
    .filter(Boolean)
    .map((line) => JSON.parse(line));
}

import { appendFileSync } from 'node:fs';
import { expect } from '@jest/globals';

/**
 * Says of the running test that it showed nothing this time, be it that chance did not play along or that the machine was too
 * unsteady to measure on. The test goes on, and is no failure; the run's summary names and counts it.
 */
export function inconclusive(reason: string): void {
  const { currentTestName: test = '', testPath: file = '' } = expect.getState();
  process.stderr.write(`INCONCLUSIVE: ${test}: ${reason}\n`);
  // Set by the reporter, before any process of the run is made.
  const log = process.env.INCONCLUSIVE_LOG;
  if (log) appendFileSync(log, `${JSON.stringify({ file, test, reason })}\n`);
}

/** A quota of chance: what had to happen by itself this often for the test to show anything. */
export function expectByChance(what: string, count: number, least: number): void {
  if (count < least) inconclusive(`${what}: ${count}, and at least ${least} were needed`);
}

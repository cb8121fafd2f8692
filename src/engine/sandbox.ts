import { createContext, Script } from 'node:vm';
import { EVALUATION_LIMIT_MS, EvaluationLimitError, tookTooLong } from './bounds.js';

const sandbox = createContext({ task: undefined as (() => unknown) | undefined });
const call = new Script('task()', { filename: 'bounded-evaluation.js' });

/**
 * Runs synchronous work under V8's watchdog, which ends loops and regular expressions that no check inside a library
 * can end. It bounds time only and is no wall against hostile JavaScript: the work is our own code reading a client's
 * template or condition. Costs about 0.1 ms. Throws {@link EvaluationLimitError}, or what `task` throws.
 */
export function runBounded<Result>(task: () => Result): Result {
  let outcome: { result: Result } | undefined;
  sandbox.task = () => {
    outcome = { result: task() };
  };
  try {
    call.runInContext(sandbox, { timeout: EVALUATION_LIMIT_MS });
  } catch (error) {
    if (isTimeout(error)) throw tookTooLong(error);
    throw error;
  } finally {
    sandbox.task = undefined;
  }
  if (outcome === undefined) throw new EvaluationLimitError('it did not end', 'time');
  return outcome.result;
}

function isTimeout(error: unknown): boolean {
  return (
    typeof error === 'object' &&
    error !== null &&
    'code' in error &&
    error.code === 'ERR_SCRIPT_EXECUTION_TIMEOUT'
  );
}

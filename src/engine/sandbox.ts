import { createContext, Script } from 'node:vm';

/**
 * What clients write (templates, conditions) may take this long, in ms. Ordinary ones take less than one; the limit is
 * there because they run on the event loop, which serves every other client meanwhile.
 */
export const EVALUATION_LIMIT_MS = 500;

/**
 * V8 searches one text for another in time up to the product of their lengths, about 1 ns a step, and nothing can
 * interrupt it; so longer searches are refused.
 */
const MAX_SEARCH_STEPS = 200_000_000;

/** A template or a condition went beyond a limit; the message says so in words for a client. */
export class EvaluationLimitError extends Error {
  override name = 'EvaluationLimitError';
}

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
    if (isTimeout(error)) {
      throw new EvaluationLimitError(`it takes longer than ${EVALUATION_LIMIT_MS} ms`, { cause: error });
    }
    throw error;
  } finally {
    sandbox.task = undefined;
  }
  if (outcome === undefined) throw new EvaluationLimitError('it did not end');
  return outcome.result;
}

/** Throws {@link EvaluationLimitError} if searching `text` for `pattern` could stop the event loop for long. */
export function refuseSlowSearch(text: unknown, pattern: unknown): void {
  const [length, patternLength] = [lengthOf(text), lengthOf(pattern)];
  if (length * patternLength <= MAX_SEARCH_STEPS) return;
  throw new EvaluationLimitError(
    `it searches a text of ${length} characters for one of ${patternLength}, which can take too long`,
  );
}

/** Of what is no text, the length of its JSON: at least what a library makes of it. */
function lengthOf(value: unknown): number {
  return typeof value === 'string' ? value.length : (JSON.stringify(value)?.length ?? 0);
}

function isTimeout(error: unknown): boolean {
  return (
    typeof error === 'object' &&
    error !== null &&
    'code' in error &&
    error.code === 'ERR_SCRIPT_EXECUTION_TIMEOUT'
  );
}

/** Longest text of an evaluation, in UTF-16 code units, and longest list, in items: what it takes, makes or gives. */
export const MAX_TEXT_CHARS = 5_000_000;
/** What one evaluation reads, and what it makes, all together: characters and items. */
export const MAX_EVALUATION_CHARS = 20_000_000;
/** What a template or a condition may take, in ms. Ordinary ones take less than one. */
export const EVALUATION_LIMIT_MS = 500;
/**
 * V8 searches one text for another in time up to the product of their lengths, about 1 ns a step, and nothing can
 * interrupt it; so longer searches are refused.
 */
const MAX_SEARCH_STEPS = 200_000_000;
/** Of a number or an object in a text: "[object Object]" and the longest numbers take no more. */
const CHARS_OF_OTHERS = 24;

/** What an evaluation went beyond: its time, the length of one text, all that it reads and makes, or the memory of its thread. */
export type EvaluationLimit = 'time' | 'text' | 'size' | 'memory';

/** A template or a condition went beyond a limit; the message says so in words for a client. */
export class EvaluationLimitError extends Error {
  override name = 'EvaluationLimitError';

  constructor(
    message: string,
    readonly limit: EvaluationLimit,
    options?: ErrorOptions,
  ) {
    super(message, options);
  }
}

export function tookTooLong(cause?: unknown): EvaluationLimitError {
  return new EvaluationLimitError(`it takes longer than ${EVALUATION_LIMIT_MS} ms`, 'time', { cause });
}

/** Throws {@link EvaluationLimitError} if searching `text` for `pattern` could take long. */
export function refuseSlowSearch(text: unknown, pattern: unknown): void {
  const [length, patternLength] = [measureText(text), measureText(pattern)];
  if (length * patternLength <= MAX_SEARCH_STEPS) return;
  throw new EvaluationLimitError(
    `it searches a text of ${length} characters for one of ${patternLength}, which can take too long`,
    'time',
  );
}

/** Throws {@link EvaluationLimitError} if `value` as a text is longer than 5,000,000 characters; returns its length. */
export function refuseLongText(value: unknown): number {
  const length = measureText(value);
  refuseLength(length);
  return length;
}

/** Throws {@link EvaluationLimitError} if a text of this length is longer than 5,000,000 characters. */
export function refuseLength(length: number): void {
  if (length <= MAX_TEXT_CHARS) return;
  throw new EvaluationLimitError(`its text is longer than ${MAX_TEXT_CHARS} characters`, 'text');
}

/**
 * Characters of the text that a value makes, at least one for each item of a list. A list can hold another one many
 * times over, and then be exponentially longer than the memory that it takes; so counting ends beyond the limit of a text.
 */
export function measureText(value: unknown): number {
  if (typeof value === 'string') return value.length;
  let length = 0;
  const pending: unknown[] = [value];
  while (pending.length > 0 && length <= MAX_TEXT_CHARS) {
    const next = pending.pop();
    if (typeof next === 'string') length += Math.max(1, next.length);
    else if (Array.isArray(next)) {
      length += 1;
      // What lies beyond the limit need not be looked at; spreading a list of millions would overflow the stack.
      for (let index = 0; index < next.length && pending.length <= MAX_TEXT_CHARS; index += 1) {
        pending.push(next[index]);
      }
      length += Math.max(0, next.length - MAX_TEXT_CHARS);
    } else length += next === undefined || next === null ? 1 : CHARS_OF_OTHERS;
  }
  return length;
}

/** Throws {@link EvaluationLimitError} if the JSON of `value`, indented by `space`, is much longer than a text may be. */
export function refuseLongJson(value: unknown, space: unknown): void {
  const indent = Math.min(10, typeof space === 'string' ? space.length : Number(space) || 0);
  let length = 0;
  const pending: { value: unknown; depth: number }[] = [{ value, depth: 0 }];
  for (let next = pending.pop(); next !== undefined; next = pending.pop()) {
    const { value: item, depth } = next;
    length += 2 + indent * depth + (typeof item === 'string' ? item.length : CHARS_OF_OTHERS);
    if (typeof item !== 'object' || item === null) continue;
    for (const key in item) {
      length += key.length;
      refuseLength(Math.max(length - MAX_EVALUATION_CHARS + MAX_TEXT_CHARS, pending.length));
      pending.push({ value: Reflect.get(item, key), depth: depth + 1 });
    }
  }
}

import { RE2JS, RE2JSException } from 're2js';
import { EvaluationLimitError } from './bounds.js';

/** Longest regular expression, in characters: one that comes out of data can be as long as a request. */
const MAX_PATTERN_CHARS = 2000;
/** Most instructions of a compiled one: each of them may look at each character of a text. */
const MAX_PROGRAM = 10_000;
/** What all that stand in one condition may weigh together, see {@link weighPattern}: to compile as much takes some 50 ms. */
export const MAX_PATTERNS_WEIGHT = 20_000;
/** Instructions that compile in the time of one class of Unicode. */
const CLASS_WEIGHT = 100;
/** Characters of a range of which the other cases are found in the time of one instruction; after the last one none has another. */
const FOLDED_AT_ONCE = 100;
const LAST_WITH_CASES = 0x1e943;
/** A range of a class: its first and its last character, each as it is or as `\x{…}`, `\x..`. */
const RANGES = /(\\x\{[\da-f]+\}|\\x[\da-f]{2}|\\.|[^\\])-(\\x\{[\da-f]+\}|\\x[\da-f]{2}|\\.|[^\\])/gisu;
/** Compiled ones that are kept. */
const MAX_KEPT = 100;

/** Parts of a regular expression: an escape, a class, a repetition with its bounds, a bracket, anything else. */
const PARTS = /\\.|\[\^?\]?(?:\[:\^?\w+:\]|\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|[()]|./gsu;

/** Whether a text matches somewhere. */
export interface Pattern {
  test(text: string): boolean;
}

const kept = new Map<string, Pattern>();

/**
 * Compiles a regular expression of RE2 (https://github.com/google/re2/wiki/Syntax), which CEL's `matches` means: it is
 * found in time linear in the text, and so there is no lookahead, lookbehind or backreference. Those used last are kept.
 * Throws an `Error` in words for a client.
 */
export function compilePattern(source: string): Pattern {
  const known = kept.get(source);
  const pattern = known ?? compile(source);
  kept.delete(source);
  kept.set(source, pattern);
  const [oldest] = kept.keys();
  if (oldest !== undefined && kept.size > MAX_KEPT) kept.delete(oldest);
  return pattern;
}

function compile(source: string): Pattern {
  if (source.length > MAX_PATTERN_CHARS) {
    throw new EvaluationLimitError(
      `a regular expression is longer than ${MAX_PATTERN_CHARS} characters`,
      'size',
    );
  }
  refuseProgram(estimateProgram(source), source);
  try {
    const pattern = RE2JS.compile(source);
    refuseProgram(pattern.programSize(), source);
    return pattern;
  } catch (error) {
    if (!(error instanceof RE2JSException)) throw error;
    throw new Error(`"${source.slice(0, 100)}" is no regular expression of RE2: ${explain(error)}`, {
      cause: error,
    });
  }
}

/** The library's message, without the words that ours has already. */
function explain(error: Error): string {
  const reason = error.message.replace(/^error parsing regexp: /, '');
  const isBeyondRe2 = /\(\?(=|!|<=|<!)/.test(reason) || /invalid escape sequence: `\\[1-9]/.test(reason);
  return isBeyondRe2 ? `${reason} (it has no lookahead, lookbehind or backreference)` : reason;
}

function refuseProgram(size: number, source: string): void {
  if (size <= MAX_PROGRAM) return;
  throw new EvaluationLimitError(
    `the regular expression "${source.slice(0, 100)}" repeats too much of itself`,
    'size',
  );
}

/** How much work it is to compile one, in instructions: classes of Unicode, and ranges whose other cases are looked for, take most. */
export function weighPattern(source: string): number {
  const foldsCases = /\(\?[a-zA-Z]*i/.test(source);
  const classes = source.match(/\\[pP]/g)?.length ?? 0;
  const weight = estimateProgram(source) + classes * CLASS_WEIGHT * (foldsCases ? 2 : 1);
  return foldsCases ? weight + weighRanges(source) : weight;
}

function weighRanges(source: string): number {
  let characters = 0;
  for (const [part] of source.matchAll(PARTS)) {
    if (!part.startsWith('[')) continue;
    for (const [, first = '', last = ''] of part.matchAll(RANGES))
      characters += Math.max(0, Math.min(codePointOf(last), LAST_WITH_CASES) - codePointOf(first));
  }
  return characters / FOLDED_AT_ONCE;
}

function codePointOf(character: string): number {
  const [, hexadecimal] = /^\\x\{?([\da-f]+)/i.exec(character) ?? [];
  return hexadecimal === undefined ? (character.codePointAt(0) ?? 0) : Number.parseInt(hexadecimal, 16);
}

/** How many instructions it becomes, about: repetitions are written out, and that alone could take seconds. */
function estimateProgram(source: string): number {
  const groups = [0];
  let last = 0;
  for (const [part, least, most] of source.matchAll(PARTS)) {
    if (part === '(') {
      groups.push(0);
    } else if (part === ')' && groups.length > 1) {
      last = (groups.pop() ?? 0) + 2;
      groups.push((groups.pop() ?? 0) + last);
    } else {
      const added = least === undefined ? 1 : last * Math.max(0, Number(most || least) - 1);
      groups.push((groups.pop() ?? 0) + added);
      last = least === undefined ? 1 : last + added;
    }
  }
  return groups.reduce((sum, size) => sum + size, 0);
}

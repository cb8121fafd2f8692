import { Environment, type ASTNode, type ParseResult } from '@marcbachmann/cel-js';
import type { Fault } from '../errors.js';
import { EvaluationLimitError, MAX_EVALUATION_CHARS, refuseSlowSearch } from './bounds.js';
import { weigh, type Weight } from './expression-weight.js';
import { jsonOf, refuseLongInput, type ConditionTask, type Evaluations } from './evaluation.js';
import { MAX_PATTERNS_WEIGHT, compilePattern, weighPattern } from './patterns.js';

const MAX_EXPRESSION_CHARS = 2000;
/**
 * The library keeps every type that it meets for ever, and a list of lists is a type of its own. These two bound how
 * many there can be: levels of list, map and macro in an expression, and levels of JSON in the value of a variable.
 */
const MAX_NESTED_AGGREGATES = 3;
const MAX_VARIABLE_LEVELS = 4;

const MACROS: ReadonlySet<string> = new Set(words('all exists exists_one filter map'));

/**
 * The functions and macros of CEL that conditions can use. The others are left out because they build values that can
 * grow exponentially with the length of an expression (`join`, `bytes`, `cel.bind`) or have no use over texts.
 */
const FUNCTIONS: ReadonlySet<string> = new Set([
  ...MACROS,
  ...words('contains startsWith endsWith matches indexOf substring split'),
  ...words('trim lowerAscii upperAscii size has'),
  ...words('int uint double string bool dyn type timestamp duration'),
]);

const NUMERIC_FUNCTIONS: ReadonlySet<string> = new Set(
  words('int uint double size indexOf timestamp duration'),
);
const ARITHMETIC: ReadonlySet<string> = new Set(words('+ - * / % -_'));

/** Functions of texts in whose place ours are put, which refuse what takes too long or makes too much. */
const REPLACED: ReadonlySet<string> = new Set(
  words('contains indexOf matches split lowerAscii upperAscii duration'),
);
const OURS = 'bounded_';
const STORED_MATCHES = `${OURS}stored_matches`;
const MAX_DURATION_CHARS = 100;
/** An expression that costs more steps than this, each of about a ns, goes into a thread. */
const MOST_INLINE_STEPS = 1_000_000;

const environment = new Environment({ limits: { maxDepth: 32 } })
  .registerVariable('query', 'string')
  .registerVariable('output', 'string')
  .registerVariable('variables', 'map<string, dyn>')
  .registerFunction(
    `string.${OURS}contains(string): bool`,
    search((text, part) => text.includes(part)),
  )
  .registerFunction(
    `string.${OURS}indexOf(string): int`,
    search((text, part) => BigInt(text.indexOf(part))),
  )
  .registerFunction(
    `string.${OURS}split(string): list<string>`,
    search((text, part) => {
      make(text.length + 1);
      return text.split(part);
    }),
  )
  .registerFunction(
    `string.${OURS}matches(string): bool`,
    search((text, part) => compilePattern(part).test(text)),
  )
  .registerFunction(
    `string.${STORED_MATCHES}(string): bool`,
    search((text, part) => toRegExp(part).test(text)),
  )
  .registerFunction(`string.${OURS}lowerAscii(): string`, (text: string) => {
    make(text.length);
    return text.toLowerCase();
  })
  .registerFunction(`string.${OURS}upperAscii(): string`, (text: string) => {
    make(text.length);
    return text.toUpperCase();
  });

/** The library reads a duration of any length, number by number, in quadratic time. */
const durations = new Environment().registerVariable('text', 'string').parse('duration(text)');
environment.registerFunction(`${OURS}duration(string): google.protobuf.Duration`, (text: string) => {
  if (text.length > MAX_DURATION_CHARS) {
    throw new EvaluationLimitError(`a duration is longer than ${MAX_DURATION_CHARS} characters`, 'size');
  }
  return durations({ text }) as unknown;
});

/** Characters and items that the evaluation that runs now has made. */
let made = 0;

function make(length: number): void {
  made += length;
  if (made <= MAX_EVALUATION_CHARS) return;
  throw new EvaluationLimitError(`it makes texts of more than ${MAX_EVALUATION_CHARS} characters`, 'size');
}

function search<Result>(find: (text: string, part: string) => Result) {
  return (text: string, part: string): Result => {
    refuseSlowSearch(text, part);
    return find(text, part);
  };
}

/** What a condition can read: the request's query, the text of the connection's source, and the run's variables. */
export interface ExpressionInput {
  query: string;
  output: string;
  /** As {@link toExpressionVariables} made them. */
  variables: Record<string, unknown>;
}

/** Copies variables for conditions: what lies more than 4 levels deep in the value of one is null. */
export function toExpressionVariables(variables: Record<string, unknown>): Record<string, unknown> {
  return pruneObject(variables, MAX_VARIABLE_LEVELS);
}

function pruneObject(value: object, levels: number): Record<string, unknown> {
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, prune(item, levels)]));
}

function prune(value: unknown, levels: number): unknown {
  if (typeof value !== 'object' || value === null) return value;
  if (levels === 0) return null;
  if (Array.isArray(value)) return value.map((item) => prune(item, levels - 1));
  return pruneObject(value, levels - 1);
}

/** A parsed and type-checked condition; many runs can use it at the same time. */
export class Expression {
  private readonly weight: Weight;

  constructor(
    private readonly source: string,
    private readonly parsed: ParseResult,
    private readonly stored: boolean,
  ) {
    this.weight = weigh(parsed.ast, OURS);
  }

  /**
   * Whether the condition holds: evaluated at once where that is cheap, else in a thread. Throws, or rejects with, an
   * `Error` whose message says what is wrong in words for a client, or `AppError` `evaluation_limit`.
   */
  holds(input: ExpressionInput, evaluations: Evaluations): boolean | Promise<boolean> {
    const turn = evaluations.turn();
    if (turn !== undefined) return turn.then(() => this.holds(input, evaluations));
    if (this.weight.perChar * this.countChars(input) > MOST_INLINE_STEPS) {
      return evaluations.inThread(() => this.toTask(input)).then((holds) => holds === true);
    }
    evaluations.countInline();
    return this.evaluate(input);
  }

  /** Evaluates here and now, without a limit in time. Throws an `Error`, to be told by {@link explainExpression}. */
  evaluate(input: ExpressionInput): boolean {
    made = 0;
    let value: unknown;
    try {
      value = this.parsed({ ...input });
    } catch (error) {
      throw explainExpression(error);
    }
    if (typeof value !== 'boolean') throw new Error('its value is neither true nor false');
    return value;
  }

  private countChars({ query, output, variables }: ExpressionInput): number {
    const { reads } = this.weight;
    return (
      1 +
      (reads.has('query') ? query.length : 0) +
      (reads.has('output') ? output.length : 0) +
      (reads.has('variables') ? jsonOf(variables).length : 0)
    );
  }

  private toTask({ query, output, variables }: ExpressionInput): ConditionTask {
    const { reads } = this.weight;
    const task: ConditionTask = {
      kind: 'condition',
      source: this.source,
      stored: this.stored,
      query: reads.has('query') ? query : undefined,
      output: reads.has('output') ? output : undefined,
      variables: reads.has('variables') ? jsonOf(variables) : undefined,
    };
    refuseLongInput([task.query, task.output, task.variables]);
    return task;
  }
}

/** Where an expression is in a definition, and where its faults go. */
export interface ExpressionPlace {
  pointer: string;
  faults: Fault[];
  /** Whether it was accepted earlier: then it keeps regular expressions of JavaScript that RE2 does not know. */
  stored?: boolean;
}

/**
 * Parses a CEL condition (https://cel.dev) of up to 2,000 characters over `query`, `output` and `variables`, and checks
 * its types. `matches` is RE2's; `+` adds numbers only, since texts that are doubled again and again would fill the memory.
 * What is wrong goes into `faults`, and then nothing is returned.
 */
export function compileExpression(
  source: string,
  { pointer, faults, stored = false }: ExpressionPlace,
): Expression | undefined {
  try {
    if (source.length > MAX_EXPRESSION_CHARS)
      throw new Error(`it is longer than ${MAX_EXPRESSION_CHARS} characters`);
    prepare(parseInCopy(source), stored);
    const parsed = environment.parse(source);
    prepare(parsed.ast, stored);
    checkTypes(parsed);
    return new Expression(source, parsed, stored);
  } catch (error) {
    faults.push({ pointer, detail: `the expression is not valid: ${explainExpression(error).message}` });
    return undefined;
  }
}

/**
 * The library also keeps the name of each function that it meets, known or not. A copy with a function of its own has
 * its own list of names, which goes with the copy.
 */
function parseInCopy(source: string): ASTNode {
  return environment
    .clone()
    .registerFunction('own_names(): bool', () => true)
    .parse(source).ast;
}

function checkTypes(parsed: ParseResult): void {
  const check = parsed.check();
  if (!check.valid) throw check.error ?? new Error('its types do not fit');
  // `dyn` is what reading a variable gives; whether that is a bool shows only in a run.
  if (check.type !== 'bool' && check.type !== 'dyn') {
    throw new Error(`it gives ${check.type}, and must give bool`);
  }
}

/**
 * Refuses what could grow without bound, and puts our functions in the place of the library's.
 * Iterative: a long chain of operators makes a tree as deep as the expression is long.
 */
function prepare(root: ASTNode, stored: boolean): void {
  let patterns = 0;
  const pending: { value: unknown; level: number }[] = [{ value: root, level: 0 }];
  for (let next = pending.pop(); next !== undefined; next = pending.pop()) {
    let { level } = next;
    if (isNode(next.value)) {
      if (isAggregate(next.value)) level += 1;
      if (level > MAX_NESTED_AGGREGATES) throw new Error('its lists, maps and macros are nested too deeply');
      refuseGrowth(next.value);
      // What was accepted earlier is kept.
      if (!stored) patterns += weightOfPattern(next.value);
      if (patterns > MAX_PATTERNS_WEIGHT) throw new Error('its regular expressions take too long to compile');
      prepareCall(next.value, stored);
    }
    const children = isNode(next.value) ? next.value.args : next.value;
    if (Array.isArray(children)) pending.push(...children.map((value: unknown) => ({ value, level })));
    else if (isNode(children)) pending.push({ value: children, level });
  }
}

function refuseGrowth(node: ASTNode): void {
  if (node.op === '+' && !(node.args as unknown[]).some(isNumeric)) {
    throw new Error('+ adds numbers only; say so with int(...) or double(...), as in int(variables.a) + 1');
  }
}

function prepareCall(node: ASTNode, stored: boolean): void {
  const name = calledName(node);
  if (name === undefined) return;
  if (!FUNCTIONS.has(name)) {
    throw new Error(`the function "${name}" is not known here; there are ${[...FUNCTIONS].join(', ')}`);
  }
  if (!REPLACED.has(name)) return;
  const isStoredPattern = name === 'matches' && !isPatternOfRe2(node, stored);
  (node.args as unknown[])[0] = isStoredPattern ? STORED_MATCHES : OURS + name;
}

/** Of a pattern that stands in the expression; what comes out of data is compiled in a thread. */
function weightOfPattern(node: ASTNode): number {
  const pattern = calledName(node) === 'matches' ? literalPattern(node) : undefined;
  return pattern === undefined ? 0 : weighPattern(pattern);
}

function literalPattern(node: ASTNode): string | undefined {
  const pattern: unknown = (node.args as unknown[]).flat().at(-1);
  return isNode(pattern) && pattern.op === 'value' && typeof pattern.args === 'string'
    ? pattern.args
    : undefined;
}

/**
 * A pattern that stands in the expression is checked now, not when the first run comes by; one that comes out of data is
 * always RE2's. False for one that only JavaScript knows, where that is allowed.
 */
function isPatternOfRe2(node: ASTNode, stored: boolean): boolean {
  const pattern = literalPattern(node);
  if (pattern === undefined) return true;
  try {
    compilePattern(pattern);
    return true;
  } catch (error) {
    if (!stored) throw error;
    toRegExp(pattern);
    return false;
  }
}

function toRegExp(source: string): RegExp {
  try {
    return new RegExp(source);
  } catch (error) {
    throw new Error(`"${source.slice(0, 100)}" is no regular expression`, { cause: error });
  }
}

function isAggregate(node: ASTNode): boolean {
  return node.op === 'list' || node.op === 'map' || MACROS.has(calledName(node) ?? '');
}

function isNode(value: unknown): value is ASTNode {
  return typeof value === 'object' && value !== null && 'op' in value && 'args' in value;
}

function calledName(node: ASTNode): string | undefined {
  return node.op === 'call' || node.op === 'rcall' ? (node.args[0] as string) : undefined;
}

/** An operand that is a number whatever the data: CEL does not convert, so the other operand must be one, too. */
function isNumeric(node: unknown): boolean {
  if (!isNode(node)) return false;
  if (node.op === 'value') return typeof node.args === 'bigint' || typeof node.args === 'number';
  const name = calledName(node);
  return name === undefined ? ARITHMETIC.has(node.op) : NUMERIC_FUNCTIONS.has(name);
}

/** What was thrown in words for a client. The library's `message` draws the expression over several lines. */
export function explainExpression(error: unknown): Error {
  if (error instanceof EvaluationLimitError) return error;
  if (error instanceof RangeError) return new Error('it is nested too deeply', { cause: error });
  if (!(error instanceof Error)) return new Error('it failed for an unknown reason', { cause: error });
  if (!('summary' in error) || typeof error.summary !== 'string') return error;
  const summary = error.summary.replaceAll(STORED_MATCHES, 'matches').replaceAll(OURS, '');
  return new Error(summary, { cause: error });
}

function words(list: string): string[] {
  return list.split(' ');
}

import { Environment, type ASTNode, type ParseResult } from '@marcbachmann/cel-js';
import type { Fault } from '../errors.js';
import { EvaluationLimitError, refuseSlowSearch, runBounded } from './sandbox.js';

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

/** Functions that search a text: the library's own are replaced by ours, which refuse what can take too long. */
const SEARCHES: ReadonlySet<string> = new Set(words('contains indexOf matches split'));
const OURS = 'bounded_';

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
    search((text, part) => text.split(part)),
  )
  .registerFunction(
    `string.${OURS}matches(string): bool`,
    search((text, part) => toPattern(part).test(text)),
  );

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
  constructor(private readonly parsed: ParseResult) {}

  /** Whether the condition holds. Throws an `Error` whose message says what is wrong in words for a client. */
  holds(input: ExpressionInput): boolean {
    let value: unknown;
    try {
      value = runBounded<unknown>(() => this.parsed({ ...input }));
    } catch (error) {
      throw new Error(explain(error), { cause: error });
    }
    if (typeof value !== 'boolean') throw new Error('its value is neither true nor false');
    return value;
  }
}

/**
 * Parses a CEL condition (https://cel.dev) of up to 2,000 characters over `query`, `output` and `variables`, and checks
 * its types. `matches` is JavaScript's RegExp, which can take exponential time, so an evaluation is ended after 500 ms;
 * `+` adds numbers only, since texts that are doubled again and again would fill the memory within that time.
 * What is wrong goes into `faults`, and then nothing is returned.
 */
export function compileExpression(
  source: string,
  at: { pointer: string; faults: Fault[] },
): Expression | undefined {
  try {
    if (source.length > MAX_EXPRESSION_CHARS)
      throw new Error(`it is longer than ${MAX_EXPRESSION_CHARS} characters`);
    prepare(parseInCopy(source));
    const parsed = environment.parse(source);
    prepare(parsed.ast);
    checkTypes(parsed);
    return new Expression(parsed);
  } catch (error) {
    at.faults.push({ pointer: at.pointer, detail: `the expression is not valid: ${explain(error)}` });
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
function prepare(root: ASTNode): void {
  const pending: { value: unknown; level: number }[] = [{ value: root, level: 0 }];
  for (let next = pending.pop(); next !== undefined; next = pending.pop()) {
    let { level } = next;
    if (isNode(next.value)) {
      if (isAggregate(next.value)) level += 1;
      if (level > MAX_NESTED_AGGREGATES) throw new Error('its lists, maps and macros are nested too deeply');
      refuseGrowth(next.value);
      prepareCall(next.value);
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

function prepareCall(node: ASTNode): void {
  const name = calledName(node);
  if (name === undefined) return;
  if (!FUNCTIONS.has(name)) {
    throw new Error(`the function "${name}" is not known here; there are ${[...FUNCTIONS].join(', ')}`);
  }
  if (name === 'matches') refusePattern(node);
  if (SEARCHES.has(name)) (node.args as unknown[])[0] = OURS + name;
}

/** A pattern that stands in the expression is checked now, not when the first run comes by. */
function refusePattern(node: ASTNode): void {
  const pattern: unknown = (node.args as unknown[]).flat().at(-1);
  if (isNode(pattern) && pattern.op === 'value' && typeof pattern.args === 'string') toPattern(pattern.args);
}

function toPattern(source: string): RegExp {
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

/** The library's `message` draws the expression over several lines; `summary` is the sentence alone. */
function explain(error: unknown): string {
  if (error instanceof EvaluationLimitError) return error.message;
  if (error instanceof RangeError) return 'it is nested too deeply';
  if (error instanceof Error && 'summary' in error && typeof error.summary === 'string') {
    return error.summary.replaceAll(OURS, '');
  }
  return error instanceof Error ? error.message : 'it failed for an unknown reason';
}

function words(list: string): string[] {
  return list.split(' ');
}

import {
  defaultOperators,
  Liquid,
  Parser,
  Tokenizer,
  toValue,
  type Context,
  type Emitter,
  type FilterImplOptions,
  type Template as ParsedTemplate,
  type TopLevelToken,
} from 'liquidjs';
import {
  EVALUATION_LIMIT_MS,
  EvaluationLimitError,
  MAX_EVALUATION_CHARS,
  refuseLength,
  refuseLongJson,
  refuseLongText,
  refuseSlowSearch,
} from './bounds.js';
import type { Pieces } from './turns.js';

const MAX_TEMPLATE_CHARS = 100_000;
/** Most tags and outputs of a template, and most lines of a tag `liquid`: what a tag encloses is read at once, 10 µs for each. */
const MAX_TAGS = 10_000;
/** So many tags, outputs and texts between them are parsed at once: about a millisecond. */
const PIECE_TOKENS = 100;

type FilterHandler = Extract<FilterImplOptions, (...values: never[]) => unknown>;

/** Filters that search a text for their first argument. */
const SEARCHES = words('split replace replace_first replace_last remove remove_first remove_last');
/** Filters that make JSON, which shows what is inside objects, too. */
const JSON_FILTERS = words('json jsonify inspect');

/**
 * Parses a Liquid template, in pieces: what a tag encloses is one of them. Throws an `Error`, to be told by {@link explainLiquid}.
 */
export function* parseLiquid(source: string): Pieces<ParsedTemplate[]> {
  if (source.length > MAX_TEMPLATE_CHARS)
    throw new Error(`it is longer than ${MAX_TEMPLATE_CHARS} characters`);
  const tags = source.split(/\{[{%]/, MAX_TAGS + 2).length - 1;
  if (tags > MAX_TAGS) throw new Error(`it has more than ${MAX_TAGS} tags and outputs`);
  const tokenizer = new Tokenizer(source, liquid.options.operators);
  const tokens = toQueue(tokenizer.readTopLevelTokens(liquid.options));
  const parser = new QueueParser(liquid);
  const parsed: ParsedTemplate[] = [];
  for (let token = tokens.shift(); token !== undefined; token = tokens.shift()) {
    parsed.push(parser.parseToken(token, tokens));
    if (parsed.length % PIECE_TOKENS === 0) yield;
  }
  return parsed;
}

/** What is left of the tokens of a template, the next one last: V8 moves all others when the first of thousands is taken away. */
class TokenQueue extends Array<TopLevelToken> {
  override shift(): TopLevelToken | undefined {
    return this.pop();
  }
}

function toQueue(tokens: readonly TopLevelToken[]): TokenQueue {
  const queue = new TokenQueue();
  for (const token of tokens.toReversed()) queue.push(token);
  return queue;
}

/** Tags get the queue and take from it; only `layout`, which there is not here, would read it as a list. */
class QueueParser extends Parser {
  /** Of the tag `liquid`, which has tokens of its own. */
  override parseTokens(tokens: TopLevelToken[]): ParsedTemplate[] {
    if (tokens.length > MAX_TAGS) throw new Error(`a tag has more than ${MAX_TAGS} lines`);
    return super.parseTokens(toQueue(tokens));
  }
}

/**
 * Renders what {@link parseLiquid} gave. Each text and list that it takes or makes on the way is bounded where it is made,
 * and so are all of them together: `{@link MAX_EVALUATION_CHARS}`. `values` may be written into.
 */
export function renderLiquid(parsed: ParsedTemplate[], values: Record<string, unknown>): string {
  return liquid.renderSync(parsed, values) as string;
}

/** LiquidJS wraps what was thrown inside; its own messages name the line and quote only the template. */
export function explainLiquid(error: unknown): Error {
  const original = error instanceof Error && 'originalError' in error ? error.originalError : error;
  if (original instanceof EvaluationLimitError) return original;
  if (!(error instanceof Error)) return new Error('it failed for an unknown reason');
  // Where the stack ends decides how often LiquidJS has wrapped this one.
  if (error.message.startsWith('Maximum call stack size exceeded'))
    return new EvaluationLimitError('it is nested too deeply', 'size');
  if (original instanceof RangeError) return new EvaluationLimitError('its text is too long', 'text');
  const [, limited] = /(memory alloc|template render) limit exceeded/.exec(error.message) ?? [];
  if (limited === undefined) return error;
  return new EvaluationLimitError(error.message, limited === 'memory alloc' ? 'size' : 'time');
}

/** Collects the text of a template, or of one `capture`, and counts it. */
class BoundedEmitter implements Emitter {
  buffer = '';
  private length = 0;

  constructor(private readonly context: Context) {}

  write(value: unknown): void {
    const text: unknown = toValue(value);
    const length = refuseLongText(text);
    this.length += length;
    this.context.memoryLimit.use(length);
    refuseLength(this.length);
    this.buffer += toText(text);
  }
}

/** As LiquidJS makes texts of values. */
function toText(value: unknown): string {
  const plain: unknown = toValue(value);
  if (typeof plain === 'string') return plain;
  if (plain === undefined || plain === null) return '';
  return Array.isArray(plain) ? plain.map(toText).join('') : String(plain);
}

function createEngine(): Liquid {
  const engine = new Liquid({
    // An empty set of templates replaces the file system.
    templates: {},
    ownPropertyOnly: true,
    strictFilters: true,
    strictVariables: false,
    memoryLimit: MAX_EVALUATION_CHARS,
    renderLimit: EVALUATION_LIMIT_MS,
    parseLimit: MAX_TEMPLATE_CHARS,
    timezoneOffset: 0,
    operators: {
      ...defaultOperators,
      contains(text, pattern, context) {
        if (typeof text === 'string') refuseSlowSearch(text, pattern);
        return defaultOperators['contains']?.(text, pattern, context);
      },
    },
  });
  for (const tag of ['include', 'render', 'layout', 'block']) delete engine.tags[tag];
  for (const [name, filter] of Object.entries(engine.filters)) {
    if (typeof filter === 'function') engine.registerFilter(name, bound(name, filter));
  }
  // The library's own collector is bounded only by what a text can be: 2^29 characters, twice for each that is compared.
  const { renderer } = engine;
  const renderTemplates = renderer.renderTemplates.bind(renderer);
  renderer.renderTemplates = (templates, context, emitter = new BoundedEmitter(context)) =>
    renderTemplates(templates, context, emitter);
  return engine;
}

/** Bounds what a filter takes and gives; the library's own limits count only some of what some of them take. */
function bound(name: string, filter: FilterHandler): FilterHandler {
  return function (text: unknown, ...more: unknown[]) {
    for (const value of [text, ...more]) refuseLongText(value);
    if (SEARCHES.has(name)) refuseSlowSearch(text, more[0]);
    if (JSON_FILTERS.has(name)) refuseLongJson(text, more[0]);
    const given: unknown = filter.call(this, text, ...more);
    return isIterator(given) ? takeLater(given, this.context) : take(given, this.context);
  };
}

function* takeLater(given: Iterator<unknown>, context: Context): Generator<unknown, unknown> {
  return take(yield* { [Symbol.iterator]: () => given }, context);
}

function take(value: unknown, context: Context): unknown {
  context.memoryLimit.use(refuseLongText(value));
  return value;
}

function isIterator(value: unknown): value is Iterator<unknown> {
  return typeof value === 'object' && value !== null && 'next' in value && typeof value.next === 'function';
}

function words(list: string): ReadonlySet<string> {
  return new Set(list.split(' '));
}

const liquid = createEngine();

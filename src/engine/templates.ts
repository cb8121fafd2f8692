import { defaultOperators, Liquid, type FilterImplOptions, type Template as ParsedTemplate } from 'liquidjs';
import { AppError, type ErrorCode, type Fault } from '../errors.js';
import type { ChatMessage } from './definition.js';
import { EVALUATION_LIMIT_MS, EvaluationLimitError, refuseSlowSearch, runBounded } from './sandbox.js';

const MAX_TEMPLATE_CHARS = 100_000;
/** Longest text that a template may give, in UTF-16 code units: it is kept in memory and in one row of the log. */
const MAX_RENDERED_CHARS = 5_000_000;
/** Limit of LiquidJS's own count of what filters and ranges allocate, in characters and items. */
const MEMORY_LIMIT = 10_000_000;

/** What a template can read. */
export interface TemplateScope {
  query: string;
  variables: Record<string, unknown>;
  chat_history: readonly ChatMessage[];
}

/** Results of the agents before this one in the graph, by `agent_id`. */
export interface EarlierResults {
  outputs: Record<string, string>;
  errors: Record<string, { code: ErrorCode; message: string }>;
}

/** A parsed template; it holds nothing of a run, so that many runs can render it at the same time. */
export class Template {
  private readonly isPlain: boolean;
  /** Without filters, loops and searches, no single part takes long: LiquidJS's own check between the parts is enough. */
  private readonly needsWatchdog: boolean;
  private readonly readsEarlier: boolean;

  constructor(
    private readonly parsed: ParsedTemplate[],
    private readonly source: string,
  ) {
    this.isPlain = !/\{[{%]/.test(source);
    this.needsWatchdog = /\||for|tablerow|contains/.test(source);
    this.readsEarlier = /outputs|errors/.test(source);
  }

  /**
   * Renders the text. `earlier` is asked only when the template names `outputs` or `errors`.
   * Throws `AppError` `agent_error` when rendering fails or goes beyond a limit.
   */
  render(scope: TemplateScope, earlier: () => EarlierResults): string {
    if (this.isPlain) return this.source;
    try {
      // A fresh object each time: tags such as increment write into it.
      const { query, variables, chat_history } = scope;
      const values = { query, variables, chat_history, ...(this.readsEarlier ? earlier() : {}) };
      const render = (): string => liquid.renderSync(this.parsed, values);
      const rendered = this.needsWatchdog ? runBounded(render) : render();
      if (rendered.length > MAX_RENDERED_CHARS)
        throw new Error(`its text is longer than ${MAX_RENDERED_CHARS} characters`);
      return rendered;
    } catch (error) {
      throw new AppError('agent_error', `The agent's template could not be rendered: ${explain(error)}.`, {
        cause: error,
      });
    }
  }
}

/**
 * Parses a Liquid template (https://shopify.github.io/liquid/) of up to 100,000 characters. It reads `query`,
 * `variables`, `chat_history`, `outputs.<agent_id>` and `errors.<agent_id>`; what is missing is empty. Other files can't
 * be included, only own properties are visible, and time, memory and length are bounded.
 * What is wrong goes into `faults`, and then nothing is returned.
 */
export function compileTemplate(
  source: string,
  at: { pointer: string; faults: Fault[] },
): Template | undefined {
  try {
    if (source.length > MAX_TEMPLATE_CHARS)
      throw new Error(`it is longer than ${MAX_TEMPLATE_CHARS} characters`);
    return new Template(liquid.parse(source), source);
  } catch (error) {
    at.faults.push({ pointer: at.pointer, detail: `the template is not valid: ${explain(error)}` });
    return undefined;
  }
}

/** Filters that search a text for their first argument. */
const SEARCHES = [
  'split',
  'replace',
  'replace_first',
  'replace_last',
  'remove',
  'remove_first',
  'remove_last',
];

function createEngine(): Liquid {
  const engine = new Liquid({
    // An empty set of templates replaces the file system.
    templates: {},
    ownPropertyOnly: true,
    strictFilters: true,
    strictVariables: false,
    memoryLimit: MEMORY_LIMIT,
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
  for (const name of SEARCHES) engine.registerFilter(name, boundSearch(engine.filters[name]));
  return engine;
}

function boundSearch(filter: FilterImplOptions | undefined): FilterImplOptions {
  if (typeof filter !== 'function') throw new Error('The template library has changed its filters');
  return function (text: unknown, pattern: unknown, ...more: unknown[]) {
    refuseSlowSearch(text, pattern);
    return filter.call(this, text, pattern, ...more);
  };
}

const liquid = createEngine();

/** LiquidJS wraps what was thrown inside; its own messages name the line and quote only the template. */
function explain(error: unknown): string {
  const original = error instanceof Error && 'originalError' in error ? error.originalError : error;
  if (original instanceof RangeError) {
    return /call stack/.test(original.message) ? 'it is nested too deeply' : 'its text is too long';
  }
  if (original instanceof EvaluationLimitError) return original.message;
  return error instanceof Error ? error.message : 'it failed for an unknown reason';
}

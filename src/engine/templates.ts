import { TypeGuards, type Output, type Template as ParsedTemplate } from 'liquidjs';
import { AppError, type ErrorCode, type Fault } from '../errors.js';
import { refuseLength } from './bounds.js';
import type { ChatMessage } from './definition.js';
import { jsonOf, refuseLongInput, type Evaluations, type MadeText, type TemplateTask } from './evaluation.js';
import { explainLiquid, parseLiquid } from './liquid.js';
import type { Pieces } from './turns.js';

/** Results of the agents before this one in the graph, by `agent_id`. */
export interface EarlierResults {
  outputs: Record<string, string>;
  errors: Record<string, { code: ErrorCode; message: string }>;
}

/** What a template can read, and who evaluates it. */
export interface TemplateScope {
  query: string;
  variables: Record<string, unknown>;
  chat_history: readonly ChatMessage[];
  /** Asked only when the template names `outputs` or `errors`. */
  earlier(): EarlierResults;
  evaluations: Evaluations;
}

/** A piece of a template that is text, or the place of a value: `{{ variables.user.name }}`. */
type Part = string | readonly string[];

type Root = 'query' | 'variables' | 'chat_history' | 'outputs' | 'errors';

const ROOTS: readonly Root[] = ['query', 'variables', 'chat_history', 'outputs', 'errors'];
/** A place or an expression that is made while rendering can name anything. */
const NAMES_ANYTHING = /_exp|(^|[^\w\]"'])\[/;
/** `outputs` in any other way than `outputs.<agent_id>` or `outputs["<agent_id>"]`. */
const NAMES_ANY_OUTPUT = /\boutputs\b(?!\s*(\.\s*[\w-]|\[\s*["']))/;

/** A template that was checked; it holds nothing of a run, so that many runs can render it at the same time. */
export class Template {
  private readonly plain: string | undefined;
  private readonly reads: ReadonlySet<Root>;
  private readonly readsAnyOutput: boolean;

  /** @param parts of a template without tags and filters, which takes no time worth a thread of its own */
  constructor(
    private readonly source: string,
    private readonly parts: readonly Part[] | undefined,
  ) {
    this.plain = parts?.every((part) => typeof part === 'string') ? parts.join('') : undefined;
    const namesAnything = NAMES_ANYTHING.test(source);
    this.reads = new Set(ROOTS.filter((root) => namesAnything || source.includes(root)));
    this.readsAnyOutput = namesAnything || NAMES_ANY_OUTPUT.test(source);
  }

  /**
   * Renders the text, once there is room for it: at once where that is cheap, else in a thread. Rejects with `AppError` `agent_error`
   * when rendering fails or goes beyond a limit, `evaluation_limit` when the execution has used up its budget.
   */
  async render(scope: TemplateScope): Promise<MadeText> {
    const { evaluations } = scope;
    if (this.plain !== undefined) return { text: this.plain, letGo: () => undefined };
    for (let turn = evaluations.turn(); turn; turn = evaluations.turn()) await turn;
    try {
      const texts = this.findTexts(scope);
      if (texts === undefined) return await evaluations.textInThread(() => this.toTask(scope));
      const letGo = await evaluations.take(texts.reduce((length, text) => length + text.length, 0));
      await evaluations.turn(); // others may have got their room in the same moment
      evaluations.countInline();
      return { text: texts.join(''), letGo };
    } catch (error) {
      throw failed(error);
    }
  }

  /** What the text consists of; undefined if that takes a thread. */
  private findTexts(scope: TemplateScope): string[] | undefined {
    if (this.parts === undefined) return undefined;
    const values = this.readScope(scope);
    const texts: string[] = [];
    let length = 0;
    for (const part of this.parts) {
      const text = typeof part === 'string' ? part : readText(values, part);
      if (text === undefined) return undefined;
      length += text.length;
      refuseLength(length);
      texts.push(text);
    }
    return texts;
  }

  /** Only what the template names: the rest can be large, and goes into the thread as a copy. */
  private toTask(scope: TemplateScope): TemplateTask {
    const { query, variables, chat_history, outputs, errors } = this.readScope(scope);
    const task: TemplateTask = {
      kind: 'template',
      source: this.source,
      query,
      variables: variables && jsonOf(variables),
      chat_history: chat_history && jsonOf(chat_history),
      outputs: outputs && this.readsAnyOutput ? outputs : pickNamed(outputs, this.source),
      errors,
    };
    const texts = [query, task.variables, task.chat_history, ...Object.values(task.outputs ?? {})];
    refuseLongInput(texts);
    return task;
  }

  private readScope(scope: TemplateScope): Partial<Omit<TemplateScope, 'evaluations'> & EarlierResults> {
    const { reads } = this;
    const earlier = reads.has('outputs') || reads.has('errors') ? scope.earlier() : undefined;
    return {
      ...(reads.has('query') && { query: scope.query }),
      ...(reads.has('variables') && { variables: scope.variables }),
      ...(reads.has('chat_history') && { chat_history: scope.chat_history }),
      ...(reads.has('outputs') && { outputs: earlier?.outputs }),
      ...(reads.has('errors') && { errors: earlier?.errors }),
    };
  }
}

/**
 * Checks a Liquid template (https://shopify.github.io/liquid/) of up to 100,000 characters and 10,000 tags. It reads
 * `query`, `variables`, `chat_history`, `outputs.<agent_id>` and `errors.<agent_id>`; what is missing is empty. Other files
 * can't be included, only own properties are visible, and time, memory and length are bounded.
 * What is wrong goes into `faults`, and then nothing is returned.
 */
export function* compileTemplate(
  source: string,
  at: { pointer: string; faults: Fault[] },
): Pieces<Template | undefined> {
  try {
    return new Template(source, toParts(yield* parseLiquid(source)));
  } catch (error) {
    const detail = `the template is not valid: ${explainLiquid(error).message}`;
    at.faults.push({ pointer: at.pointer, detail });
    return undefined;
  }
}

/** The parts of a template of text and values alone; undefined if there is anything else in it. */
function toParts(parsed: ParsedTemplate[]): Part[] | undefined {
  const parts: Part[] = [];
  for (const template of parsed) {
    const part = TypeGuards.isHTMLToken(template.token) ? template.token.getContent() : toPath(template);
    if (part === undefined) return undefined;
    parts.push(part);
  }
  return parts;
}

function toPath(template: ParsedTemplate): string[] | undefined {
  if (!isOutput(template) || template.value.filters.length > 0) return undefined;
  const [place, ...more] = template.value.initial.postfix;
  if (!TypeGuards.isPropertyAccessToken(place) || more.length > 0 || place.variable !== undefined) {
    return undefined;
  }
  const names = place.props.map((prop) =>
    TypeGuards.isWordToken(prop) || TypeGuards.isQuotedToken(prop) ? prop.content : undefined,
  );
  return names.every((name) => name !== undefined) ? names : undefined;
}

function isOutput(template: ParsedTemplate): template is Output {
  return TypeGuards.isOutputToken(template.token) && 'value' in template;
}

/** The text of a value, "" of none; undefined for what only the library itself knows how to read or to write. */
function readText(values: object, path: readonly string[]): string | undefined {
  let value: unknown = values;
  for (const name of path) {
    if (value === undefined || value === null) return '';
    if (typeof value !== 'object' || Array.isArray(value)) return undefined;
    // `size`, `first` and `last` are more than names.
    if (!Object.hasOwn(value, name) && /^(size|first|last)$/.test(name)) return undefined;
    value = Object.hasOwn(value, name) ? Reflect.get(value, name) : undefined;
  }
  if (typeof value === 'object' && value !== null) return undefined;
  return value === undefined || value === null ? '' : String(value);
}

function pickNamed(outputs: Record<string, string> | undefined, source: string) {
  return (
    outputs && Object.fromEntries(Object.entries(outputs).filter(([agent_id]) => source.includes(agent_id)))
  );
}

function failed(error: unknown): AppError {
  if (error instanceof AppError) return error;
  const reason = error instanceof Error ? error.message : 'it failed for an unknown reason';
  return new AppError('agent_error', `The agent's template could not be rendered: ${reason}.`, {
    cause: error,
  });
}

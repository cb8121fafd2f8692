import { parentPort } from 'node:worker_threads';
import type { Template as ParsedTemplate } from 'liquidjs';
import { EvaluationLimitError } from './bounds.js';
import type {
  ConditionTask,
  Evaluated,
  EvaluationResult,
  EvaluationTask,
  TemplateTask,
} from './evaluation.js';
import { compileExpression, type Expression } from './expressions.js';
import { explainLiquid, parseLiquid, renderLiquid } from './liquid.js';
import { runBounded } from './sandbox.js';
import { atOnce } from './turns.js';

/** Said to the process when a task begins: what it waited for the thread is not its own time. */
export interface Began {
  began: number;
}

/** A task and its number. */
export type NumberedTask = EvaluationTask & { id: number };

/** Characters of the sources whose parsed form is kept. */
const MAX_KEPT_CHARS = 500_000;

/** What parsing a source gave; those used last are kept. */
class Parsed<Result> {
  private readonly kept = new Map<string, Result>();
  private chars = 0;

  constructor(private readonly parse: (source: string) => Result) {}

  get(source: string): Result {
    const known = this.kept.get(source);
    const parsed = known ?? this.parse(source);
    if (known !== undefined) this.forget(source);
    this.kept.set(source, parsed);
    this.chars += source.length;
    for (const oldest of this.kept.keys()) {
      if (this.chars <= MAX_KEPT_CHARS) break;
      this.forget(oldest);
    }
    return parsed;
  }

  private forget(source: string): void {
    if (this.kept.delete(source)) this.chars -= source.length;
  }
}

const templates = new Parsed<ParsedTemplate[]>((source) => atOnce(parseLiquid(source)));
const expressions = {
  stored: new Parsed((source) => toExpression(source, true)),
  accepted: new Parsed((source) => toExpression(source, false)),
};
/** A run often evaluates one condition after the other over the same variables. */
let lastVariables: { json: string; value: Record<string, unknown> } | undefined;

/** Evaluates one task, in a thread of its own; the default export, as the pool of threads wants it. */
export default function evaluate(task: NumberedTask): Evaluated {
  parentPort?.postMessage({ began: task.id } satisfies Began);
  const begun = performance.now();
  const result = attempt(task);
  return { ...result, took_ms: performance.now() - begun };
}

function attempt(task: EvaluationTask): EvaluationResult {
  try {
    return { value: runBounded(() => (task.kind === 'template' ? render(task) : holds(task))) };
  } catch (error) {
    if (error instanceof EvaluationLimitError) return { failure: error.message, limit: error.limit };
    return { failure: error instanceof Error ? error.message : 'it failed for an unknown reason' };
  }
}

function render({ source, variables, chat_history, query, outputs, errors }: TemplateTask): string {
  try {
    return renderLiquid(templates.get(source), {
      query,
      variables: variables === undefined ? {} : (JSON.parse(variables) as unknown),
      chat_history: chat_history === undefined ? [] : (JSON.parse(chat_history) as unknown),
      ...(outputs && { outputs }),
      ...(errors && { errors }),
    });
  } catch (error) {
    throw explainLiquid(error);
  }
}

function holds({ source, stored, query = '', output = '', variables }: ConditionTask): boolean {
  const expression = (stored ? expressions.stored : expressions.accepted).get(source);
  return expression.evaluate({ query, output, variables: readVariables(variables) });
}

function readVariables(json = '{}'): Record<string, unknown> {
  if (lastVariables?.json !== json) {
    lastVariables = { json, value: JSON.parse(json) as Record<string, unknown> };
  }
  return lastVariables.value;
}

function toExpression(source: string, stored: boolean): Expression {
  const at = { pointer: '', faults: [], stored };
  const expression = compileExpression(source, at);
  if (expression === undefined) throw new Error('it was accepted, and is not valid any more');
  return expression;
}

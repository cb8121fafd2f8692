import { afterAll } from '@jest/globals';
import { AppError, type Fault } from '../../src/errors.js';
import { EvaluationPool } from '../../src/engine/evaluation-pool.js';
import { Evaluations, type Evaluator } from '../../src/engine/evaluation.js';
import { compileGraph, type Graph } from '../../src/engine/graph.js';
import { OutputMemory } from '../../src/engine/output-memory.js';
import {
  runGraph,
  type GraphRun,
  type RunInput,
  type RunObserver,
  type StepResult,
} from '../../src/engine/runner.js';
import { Metrics } from '../../src/metrics.js';
import {
  ModelRegistry,
  type Model,
  type ModelPart,
  type ModelRequest,
} from '../../src/models/model-registry.js';
import type { ModelUsage } from '../../src/models/usage.js';

const opened: { pool: EvaluationPool; defects: unknown[] }[] = [];

afterAll(async () => {
  await Promise.all(opened.map(({ pool }) => pool.close()));
  const defects = opened.flatMap(({ defects }) => defects);
  if (defects.length > 0) throw new AggregateError(defects, 'Threads ended in a way that they should not');
});

/** A pool for a test: its threads end with the test file, and what should not happen to them fails it. */
export function openPool({ budget_ms = 2000, threads = 2 } = {}) {
  const metrics = new Metrics();
  const defects: unknown[] = [];
  const pool = new EvaluationPool({ threads, budget_ms, metrics, onDefect: (error) => defects.push(error) });
  opened.push({ pool, defects });
  return { pool, metrics };
}

/** The pool of all runs of a test file; it starts threads only where they are needed. */
export const { pool } = openPool();

/** The evaluations of a run that nobody stops. */
export function evaluations(
  evaluator: Evaluator = pool,
  held = new OutputMemory(Infinity, 1).open(),
): Evaluations {
  return new Evaluations(evaluator, new AbortController().signal, held);
}

/** How a scripted model answers its `call`th request, counted from 1: each item of the iteration is one batch of parts. */
export type Script = (request: ModelRequest, signal: AbortSignal, call: number) => AsyncIterable<ModelPart[]>;

export const USAGE: ModelUsage = { input_tokens: 3, output_tokens: 5 };

/** Double of the models' content: `test/<name>` answers with the script of that name. */
export class ScriptedModels extends ModelRegistry {
  readonly requests: { model: string; method: 'stream' | 'generate'; request: ModelRequest }[] = [];

  constructor(private readonly scripts: Record<string, Script> = {}) {
    super();
  }

  check(model: string): string | undefined {
    return model.startsWith('test/') ? undefined : `there is no provider for "${model}"`;
  }

  resolve(model: string): Model {
    const script = this.scripts[model.slice('test/'.length)];
    if (script === undefined) throw new AppError('model_not_configured', `There is no model "${model}".`);
    const answer = (method: 'stream' | 'generate', request: ModelRequest, signal: AbortSignal) => {
      const call = this.requests.filter((earlier) => earlier.model === model).length + 1;
      this.requests.push({ model, method, request });
      return script(request, signal, call);
    };
    return {
      stream: (request, signal) => answer('stream', request, signal),
      generate: async (request, signal) => {
        let text = '';
        let usage: ModelUsage = { input_tokens: 0, output_tokens: 0 };
        for await (const parts of answer('generate', request, signal)) {
          for (const part of parts) {
            if (part.type === 'text') text += part.text;
            else usage = part.usage;
          }
        }
        return { text, usage };
      },
    };
  }
}

/** Answers with these texts, one batch each. */
export function says(...texts: string[]): Script {
  return async function* () {
    for (const text of texts) yield [{ type: 'text', text }];
    yield [{ type: 'finish', usage: USAGE }];
  };
}

/** Gives these texts, then throws. */
export function fails(error: unknown, ...texts: string[]): Script {
  return async function* () {
    for (const text of texts) yield [{ type: 'text', text }];
    throw error;
  };
}

/** Does something in place of speaking. */
export function acts(act: (signal: AbortSignal) => Promise<void> | void): Script {
  return async function* (_request, signal) {
    await act(signal);
    yield [];
  };
}

/** Gives these texts, then nothing until it is aborted. */
export function hangs(...texts: string[]): Script {
  return async function* (_request, signal) {
    for (const text of texts) yield [{ type: 'text', text }];
    await aborted(signal);
    throw signal.reason;
  };
}

/** The scripts in turn, one a call; the last one for all further calls. */
export function inTurn(...scripts: Script[]): Script {
  return (request, signal, call) => {
    const script = scripts[Math.min(call, scripts.length) - 1];
    if (script === undefined) throw new Error('No script is left');
    return script(request, signal, call);
  };
}

export function aborted(signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    if (signal.aborted) resolve();
    else signal.addEventListener('abort', () => resolve(), { once: true });
  });
}

/** A promise and what settles it. */
export function deferred<Value = void>() {
  let resolve!: (value: Value) => void;
  let reject!: (error: unknown) => void;
  const promise = new Promise<Value>((onResolve, onReject) => {
    resolve = onResolve;
    reject = onReject;
  });
  return { promise, resolve, reject };
}

/** Resolves for everybody once `count` have come: shows that so many are there at the same time. */
export function barrier(count: number): () => Promise<void> {
  const full = deferred();
  let come = 0;
  return () => {
    come += 1;
    if (come === count) full.resolve();
    return full.promise;
  };
}

/** A step that speaks a fixed or templated text. */
export function template(agent_id: string, text = agent_id): Record<string, unknown> {
  return { agent_id, agent_type: 'template', config: { template: text } };
}

/** A step that asks the scripted model of this name. */
export function llm(agent_id: string, model = agent_id, config: Record<string, unknown> = {}) {
  return { agent_id, agent_type: 'llm', config: { model: `test/${model}`, ...config } };
}

/** `connect('a', 'b')`, or with a CEL condition, or with other fields. */
export function connect(source: string, target: string, more: string | Record<string, unknown> = {}) {
  const fields =
    typeof more === 'string' ? { connection_type: 'conditional', conditions: { expression: more } } : more;
  return { source_agent_id: source, target_agent_id: target, ...fields };
}

export function onError(source: string, target: string) {
  return connect(source, target, { connection_type: 'error' });
}

export const LIMITS = { maxAgents: 100, maxConnections: 1000 };

export function compile(
  agents: unknown[],
  connections?: unknown[],
  { models = new ScriptedModels(), limits = LIMITS }: { models?: ModelRegistry; limits?: typeof LIMITS } = {},
): Graph {
  return compileGraph({ agents, ...(connections && { connections }) }, { models, limits });
}

/** The faults of the AppError that `action` throws; fails if it throws nothing or something else. */
export function faultsOf(action: () => unknown, code = 'workflow_invalid'): Fault[] {
  try {
    action();
  } catch (error) {
    if (error instanceof AppError && error.code === code && error.faults !== undefined) return error.faults;
    throw error;
  }
  throw new Error(`No AppError ${code} was thrown`);
}

/** Keeps what it is told: `events` in order, `steps` by agent. */
export class Recorder implements RunObserver {
  readonly events: string[] = [];
  readonly steps = new Map<string, StepResult>();
  readonly defects: unknown[] = [];

  stepStarted(agent_id: string): Promise<void> | void {
    this.events.push(`start ${agent_id}`);
  }

  content(agent_id: string, text: string): Promise<void> | undefined {
    this.events.push(`${agent_id}: ${text}`);
    return undefined;
  }

  stepFinished(step: StepResult): Promise<void> | void {
    this.record(step);
  }

  record(step: StepResult): void {
    if (this.steps.has(step.agent_id)) throw new Error(`${step.agent_id} was reported twice`);
    this.events.push(`${step.status} ${step.agent_id}`);
    this.steps.set(step.agent_id, step);
  }

  defect(error: unknown): void {
    this.defects.push(error);
  }

  statuses(): Record<string, string> {
    return Object.fromEntries([...this.steps].map(([agent_id, { status }]) => [agent_id, status]));
  }
}

/** The checkpoint of a step, to be put into `completed`. */
export function step(agent_id: string, more: Partial<StepResult> = {}): [string, StepResult] {
  const usage = { input_tokens: 1, output_tokens: 1 };
  return [agent_id, { agent_id, status: 'completed', output: `stored ${agent_id}`, usage, ...more }];
}

/** Runs `graph`; what is left out is empty, and the observer a {@link Recorder}. */
export function execute(
  graph: Graph,
  {
    input = {},
    models = new ScriptedModels(),
    observer = new Recorder(),
    evaluator = pool,
    limits = { agent: Infinity, execution: Infinity },
    held = new OutputMemory(Infinity, 1).open(),
    completed,
    signal = new AbortController().signal,
  }: { input?: Partial<RunInput> } & Partial<Omit<GraphRun, 'graph' | 'input'>> = {},
) {
  return runGraph({
    graph,
    input: { query: 'the query', chat_history: [], overrides: {}, ...input },
    models,
    evaluator,
    limits,
    held,
    observer,
    completed,
    signal,
  });
}

/** Runs one llm agent `a` with this script as `test/a`; `test/other` is there, too. */
export async function ask(
  script: Script,
  config: Record<string, unknown> = {},
  input: Partial<RunInput> = {},
) {
  const models = new ScriptedModels({ a: script, other: says('other') });
  const observer = new Recorder();
  const graph = compile([llm('a', 'a', config)], [], { models });
  const outcome = await execute(graph, { models, observer, input });
  return { outcome, models, observer, request: models.requests[0]?.request };
}

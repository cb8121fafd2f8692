import type { z } from 'zod';
import type { ErrorCode, Fault } from '../../errors.js';
import type { ModelRegistry } from '../../models/model-registry.js';
import type { ModelUsage } from '../../models/usage.js';
import type { AgentOverrides, ChatMessage } from '../definition.js';
import type { Evaluations } from '../evaluation.js';
import type { EarlierResults } from '../templates.js';
import type { Pieces } from '../turns.js';
import { parseShape } from '../validation.js';

/** Why a step failed, in words for a client. */
export interface StepError {
  code: ErrorCode;
  message: string;
}

/** An agent whose connection to the running one was taken: with its `output`, or its `error` if that is why it was. */
export interface Source {
  agent_id: string;
  name?: string;
  output?: string;
  error?: StepError;
}

/** What an agent is given for one run. */
export interface AgentContext {
  agent_id: string;
  query: string;
  chat_history: readonly ChatMessage[];
  variables: Record<string, unknown>;
  /** In the order of the connections' priority. */
  sources: readonly Source[];
  /** Results of all agents before this one in the graph, for templates. */
  earlier(): EarlierResults;
  /** Evaluates the run's templates: what `Template.render` takes is in here. */
  evaluations: Evaluations;
  /** What the request changes for this agent; its `variables` are in {@link variables} already. */
  overrides: AgentOverrides;
  models: ModelRegistry;
  /** The run's number of repeats of a failed model call; the agent's own configuration goes before it. */
  max_retries?: number;
  signal: AbortSignal;
  /**
   * Adds text, unless it is empty, to the agent's output; nothing else does. Wait for the promise, if there is one, before going on: the
   * reader is behind. Throws when the run was stopped.
   */
  emit(text: string): Promise<void> | undefined;
  /** Hands an error that did not end the step (a model call that will be repeated) to the log. */
  report(error: unknown): void;
}

/** An agent of a compiled graph. It keeps no state between runs, so that many can use it at the same time. */
export interface Agent {
  /**
   * Speaks through `context.emit` and gives back the tokens that were used. Throws `AppError` with words for a client.
   * When `context.signal` aborts, it ends whatever it waits for and throws.
   */
  run(context: AgentContext): Promise<ModelUsage>;
}

/** Where an agent's `config` is in the definition, and where its faults go. */
export interface CompileContext {
  pointer: string;
  models: ModelRegistry;
  faults: Fault[];
}

/** A kind of agent (`agent_type`). */
export interface AgentKind {
  /** Checks an agent's `config`; what is wrong goes into `context.faults`, and then nothing is returned. */
  compile(config: unknown, context: CompileContext): Pieces<Agent | undefined>;
}

/** Makes a kind of agent from the schema of its `config` and a function that compiles what fits the schema. */
export function agentKind<Schema extends z.ZodType>(
  schema: Schema,
  compile: (config: z.output<Schema>, context: CompileContext) => Pieces<Agent | undefined>,
): AgentKind {
  return {
    *compile(value, context) {
      const config = parseShape(schema, value, context);
      return config === undefined ? undefined : yield* compile(config, context);
    },
  };
}

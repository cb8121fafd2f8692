import { setMaxListeners } from 'node:events';
import { AppError, type ErrorCode } from '../errors.js';
import { slicesOf } from '../json-text.js';
import type { ModelRegistry } from '../models/model-registry.js';
import { NO_USAGE, addUsage } from '../models/usage.js';
import type { ModelUsage } from '../models/usage.js';
import type { AgentContext, Source, StepError } from './agents/agent.js';
import type { AgentOverrides, ChatMessage, RuntimeOverrides } from './definition.js';
import { Evaluations, type Evaluator } from './evaluation.js';
import { toExpressionVariables } from './expressions.js';
import type { Graph, GraphAgent, GraphConnection } from './graph.js';
import type { HeldOutput } from './output-memory.js';
import { OutputMeter, type OutputLimits } from './output-meter.js';
import { errorOf, isLimitOfExecution, toStepError } from './step-errors.js';
import type { EarlierResults } from './templates.js';

/** What one run of a graph is about. */
export interface RunInput {
  query: string;
  chat_history: ChatMessage[];
  overrides: RuntimeOverrides;
  /** The deployment's variables; those of the overrides go before them. */
  variables?: Record<string, unknown>;
  /** How often a model call that failed before its first text is repeated, where the agent doesn't say; 2 by default. */
  max_retries?: number;
}

/** How the run of one agent ended. `output` is all text that it gave, also when it did not complete. */
export interface StepResult {
  agent_id: string;
  status: 'completed' | 'error' | 'skipped' | 'cancelled';
  output: string;
  error?: { code: ErrorCode; message: string };
  usage: ModelUsage;
}

/** Sees a run from outside. What it throws stops the run and is thrown by {@link runGraph}; it isn't called again then. */
export interface RunObserver {
  /** Awaited before the agent runs. Not called for skipped agents. */
  stepStarted(agent_id: string): Promise<void> | void;
  /** Every agent's text as it comes. A promise holds that agent, and its provider, back until there is room for more. */
  content(agent_id: string, text: string): Promise<void> | undefined;
  /** Asked before each text, as another agent may have taken the room: resolves when there may be some, nothing where there is. */
  room?(): Promise<void> | undefined;
  /** Awaited before any successor starts, so that it can keep the result as a checkpoint. Also for skipped agents. */
  stepFinished(step: StepResult): Promise<void> | void;
  /** What lies behind a failed step or a repeated model call, for the log alone: clients see `StepResult.error`. */
  defect?(error: unknown, agent_id: string): void;
}

export interface RunOutcome {
  status: 'completed' | 'error' | 'aborted';
  /** Texts of the answering agents in the order of the definition, empty ones left out, joined by an empty line. */
  response: string;
  error?: { code: ErrorCode; message: string };
  /** Of all steps, those of `completed` included. */
  usage: ModelUsage;
}

export interface GraphRun {
  graph: Graph;
  input: RunInput;
  models: ModelRegistry;
  evaluator: Evaluator;
  limits: OutputLimits;
  /** What the run holds in memory; whoever opened it releases it after the run, whose outcome holds it as well. */
  held: HeldOutput;
  observer: RunObserver;
  /** Checkpoints of an earlier attempt, by `agent_id`: what has a result other than `cancelled` is not run again. */
  completed?: ReadonlyMap<string, StepResult>;
  signal: AbortSignal;
}

/**
 * Runs a graph to its end: independent agents in parallel, each one once all of its incoming connections are decided.
 * An agent none of whose connections was taken is skipped. A failed agent without an outgoing error connection ends the
 * run with its error; `signal` ends it as `aborted`. Either way the other agents are aborted and waited for.
 * Rejects only with what the observer threw.
 */
export function runGraph(run: GraphRun): Promise<RunOutcome> {
  return new Run(run).toEnd();
}

/** An agent within one run. */
interface StepState {
  readonly agent: GraphAgent;
  /** Incoming connections that nobody knows of yet whether they are taken. */
  undecided: number;
  readonly taken: Set<GraphConnection>;
  text: string;
  result?: StepResult;
}

/** Code units of a text that are said in one turn of the event loop. */
const MOST_AT_ONCE = 32 * 1024;

class Run {
  private readonly states = new Map<string, StepState>();
  private readonly variables: Record<string, unknown>;
  private expressionVariables: Record<string, unknown> | undefined;
  /** Aborted without a reason of our own: model clients know nothing but an AbortError for an abort. */
  private readonly stop = new AbortController();
  private readonly evaluations: Evaluations;
  private readonly output: OutputMeter;
  private failure: StepError | undefined;
  private observerFailure: { error: unknown } | undefined;
  private running = 0;
  private allSettled: () => void = () => undefined;

  constructor(private readonly run: GraphRun) {
    const { graph, input } = run;
    this.variables = { ...input.variables, ...input.overrides.variables };
    // Every parallel agent listens; Node warns of a leak from the 11th listener on.
    setMaxListeners(0, this.stop.signal);
    this.evaluations = new Evaluations(run.evaluator, this.stop.signal, run.held);
    this.output = new OutputMeter(run.limits, run.held);
    for (const agent of graph.agents.values()) {
      this.states.set(agent.agent_id, {
        agent,
        undecided: agent.incoming.length,
        taken: new Set(),
        text: '',
      });
    }
  }

  async toEnd(): Promise<RunOutcome> {
    const { signal } = this.run;
    const abort = () => this.stop.abort();
    signal.addEventListener('abort', abort, { once: true });
    if (signal.aborted) abort();
    try {
      await new Promise<void>((resolve) => {
        this.allSettled = resolve;
        this.track(this.begin());
      });
    } finally {
      signal.removeEventListener('abort', abort);
    }
    if (this.observerFailure !== undefined) throw this.observerFailure.error;
    return this.outcome();
  }

  private async begin(): Promise<void> {
    for (const { agent_id } of this.run.graph.order) {
      const restored = this.restore(this.state(agent_id));
      if (restored !== undefined) await restored;
    }
    if (this.stop.signal.aborted) return;
    for (const state of this.states.values()) {
      if (state.result === undefined && state.undecided === 0) this.start(state);
    }
  }

  private restore(state: StepState): Promise<unknown> | undefined {
    const stored = this.run.completed?.get(state.agent.agent_id);
    if (stored === undefined || stored.status === 'cancelled') return undefined;
    state.result = stored;
    state.text = stored.output;
    this.output.restore(stored.output);
    this.failUnlessHandled(state, stored);
    return this.decide(state, stored);
  }

  private start(state: StepState): void {
    const isRun = state.agent.incoming.length === 0 || state.taken.size > 0;
    this.track(isRun ? this.step(state) : this.skip(state));
  }

  /** The task is on its own from here: nobody awaits it, so that a chain of agents is no chain of promises. */
  private track(task: Promise<void>): void {
    this.running += 1;
    void task
      .catch((error: unknown) => this.observerFailed(error))
      .finally(() => {
        this.running -= 1;
        if (this.running === 0) this.allSettled();
      });
  }

  private async skip(state: StepState): Promise<void> {
    await this.finish(state, this.result(state, 'skipped'));
  }

  private async step(state: StepState): Promise<void> {
    await this.run.observer.stepStarted(state.agent.agent_id);
    await this.finish(state, await this.perform(state));
  }

  private async perform(state: StepState): Promise<StepResult> {
    const { agent } = state;
    if (this.stop.signal.aborted) return this.result(state, 'cancelled');
    try {
      const usage = await agent.agent.run(this.context(state));
      return { ...this.result(state, 'completed'), usage };
    } catch (error) {
      if (this.stop.signal.aborted) return this.result(state, 'cancelled');
      this.run.observer.defect?.(error, agent.agent_id);
      if (isLimitOfExecution(error)) this.fail(toStepError(error, agent.agent_id));
      return { ...this.result(state, 'error'), error: toStepError(error, agent.agent_id) };
    }
  }

  private result(state: StepState, status: StepResult['status']): StepResult {
    return { agent_id: state.agent.agent_id, status, output: state.text, usage: NO_USAGE };
  }

  private async finish(state: StepState, result: StepResult): Promise<void> {
    state.result = result;
    // Before the observer's checkpoint, so that the other agents' model calls end without waiting for it.
    this.failUnlessHandled(state, result);
    if (this.observerFailure !== undefined) return;
    await this.run.observer.stepFinished(result);
    if (this.stop.signal.aborted) return;
    const ready = await this.decide(state, result);
    if (!this.stop.signal.aborted) for (const next of ready) this.start(next);
  }

  /** Decides the agent's outgoing connections; returns the agents that know all of theirs by that. */
  private async decide({ agent }: StepState, result: StepResult): Promise<StepState[]> {
    const ready: StepState[] = [];
    for (const connection of agent.outgoing) {
      const target = this.state(connection.target_agent_id);
      const taken = this.isTaken(connection, result);
      // Awaiting only where there is something to wait for keeps what happens at once in one turn.
      if (typeof taken === 'boolean' ? taken : await taken) target.taken.add(connection);
      // A condition that failed has ended the run: what is left has no meaning any more.
      if (this.stop.signal.aborted) return [];
      target.undecided -= 1;
      if (target.undecided === 0) ready.push(target);
    }
    return ready;
  }

  private isTaken(connection: GraphConnection, { status, output }: StepResult): boolean | Promise<boolean> {
    switch (connection.connection_type) {
      case 'default':
        return status === 'completed';
      case 'error':
        return status === 'error';
      case 'conditional':
        return status === 'completed' && this.holds(connection, output);
    }
  }

  private holds(
    connection: Extract<GraphConnection, { connection_type: 'conditional' }>,
    output: string,
  ): boolean | Promise<boolean> {
    const failed = (error: unknown) => this.conditionFailed(connection, error);
    try {
      this.expressionVariables ??= toExpressionVariables(this.variables);
      const { query } = this.run.input;
      const input = { query, output, variables: this.expressionVariables };
      const holds = connection.expression.holds(input, this.evaluations);
      return typeof holds === 'boolean' ? holds : holds.catch(failed);
    } catch (error) {
      return failed(error);
    }
  }

  private conditionFailed({ source_agent_id, target_agent_id }: GraphConnection, error: unknown): false {
    if (this.stop.signal.aborted) return false;
    const reason = error instanceof Error ? error.message : 'it failed for an unknown reason';
    const message = `The condition of the connection "${source_agent_id} -> ${target_agent_id}" can't be evaluated: ${reason.replace(/\.$/, '')}.`;
    this.fail({ code: error instanceof AppError ? error.code : 'agent_error', message });
    return false;
  }

  private failUnlessHandled({ agent }: StepState, result: StepResult): void {
    const isHandled = agent.outgoing.some((connection) => connection.connection_type === 'error');
    if (result.status === 'error' && !isHandled) this.fail(errorOf(result));
  }

  private fail(error: StepError): void {
    this.failure ??= error;
    this.stop.abort();
  }

  private observerFailed(error: unknown): void {
    this.observerFailure ??= { error };
    this.stop.abort();
  }

  private context(state: StepState): AgentContext {
    const { input, models, observer } = this.run;
    const { agent_id } = state.agent;
    const overrides = this.overridesOf(agent_id);
    return {
      agent_id,
      query: input.query,
      chat_history: input.chat_history,
      variables: this.variablesOf(agent_id),
      sources: this.sources(state),
      earlier: () => this.earlier(state),
      evaluations: this.evaluations,
      overrides,
      models,
      max_retries: input.max_retries,
      signal: this.stop.signal,
      emit: (text) => this.emit(state, text),
      report: (error) => observer.defect?.(error, agent_id),
    };
  }

  /** The request's fields for every agent, those for this one before them. The top-level `timeout` is the run's. */
  private overridesOf(agent_id: string): AgentOverrides {
    const { agents, timeout: _runTimeout, ...common } = this.run.input.overrides;
    return {
      ...common,
      ...(agents !== undefined && Object.hasOwn(agents, agent_id) ? agents[agent_id] : {}),
    };
  }

  private variablesOf(agent_id: string): Record<string, unknown> {
    const { agents } = this.run.input.overrides;
    const own = agents !== undefined && Object.hasOwn(agents, agent_id) ? agents[agent_id] : undefined;
    return own?.variables === undefined ? this.variables : { ...this.variables, ...own.variables };
  }

  private emit(state: StepState, text: string): Promise<void> | undefined {
    if (text.length > MOST_AT_ONCE) return this.emitInSlices(state, text);
    this.stop.signal.throwIfAborted();
    if (text === '') return undefined;
    const failed = (error: unknown): never => {
      this.observerFailed(error);
      throw error;
    };
    const room = this.run.observer.room?.()?.catch(failed) ?? this.output.room(this.stop.signal);
    if (room) return room.then(() => this.emit(state, text));
    this.output.add(state.agent.agent_id, text);
    state.text += text;
    try {
      return this.run.observer.content(state.agent.agent_id, text)?.catch(failed);
    } catch (error) {
      return failed(error);
    }
  }

  /** A template says millions of characters at once: others get their turns meanwhile, and it waits for the log. */
  private async emitInSlices(state: StepState, text: string): Promise<void> {
    for (const slice of slicesOf(text, MOST_AT_ONCE)) {
      await this.evaluations.turn();
      await this.emit(state, slice);
    }
  }

  private sources({ agent, taken }: StepState): Source[] {
    const sources = new Map<string, Source>();
    for (const connection of agent.incoming) {
      const { source_agent_id: agent_id } = connection;
      if (!taken.has(connection) || sources.has(agent_id)) continue;
      const { agent: source, result } = this.state(agent_id);
      const said = result?.status === 'error' ? { error: errorOf(result) } : { output: result?.output };
      sources.set(agent_id, { agent_id, name: source.name, ...said });
    }
    return [...sources.values()];
  }

  /** Of all agents that lead to this one, and of no other: those would be there or not by chance. */
  private earlier({ agent }: StepState): EarlierResults {
    const results: EarlierResults = { outputs: {}, errors: {} };
    const ancestors = new Set([agent]);
    // A set is walked in the order of insertion, what is added meanwhile included.
    for (const { incoming } of ancestors) {
      for (const { source_agent_id } of incoming) {
        const { agent: source, result } = this.state(source_agent_id);
        ancestors.add(source);
        if (result?.status === 'completed') results.outputs[source_agent_id] = result.output;
        if (result?.status === 'error') results.errors[source_agent_id] = errorOf(result);
      }
    }
    return results;
  }

  private outcome(): RunOutcome {
    const states = [...this.states.values()];
    const usage = states.reduce((sum, { result }) => addUsage(sum, result?.usage ?? NO_USAGE), NO_USAGE);
    if (this.failure !== undefined) {
      return { status: 'error', response: this.response(states), error: this.failure, usage };
    }
    const isComplete = states.every(({ result }) => result !== undefined && result.status !== 'cancelled');
    if (!isComplete) return { status: 'aborted', response: this.response(states), usage };
    const completed = states.filter(({ result }) => result?.status === 'completed');
    return { status: 'completed', response: this.response(completed), usage };
  }

  private response(states: StepState[]): string {
    return states
      .filter(({ agent, text }) => text !== '' && this.run.graph.answers(agent.agent_id))
      .map(({ text }) => text)
      .join('\n\n');
  }

  private state(agent_id: string): StepState {
    const state = this.states.get(agent_id);
    if (state === undefined) throw new Error(`The graph has no agent "${agent_id}"`);
    return state;
  }
}

import { Logger } from '@nestjs/common';
import { v7 as uuidv7 } from 'uuid';
import type { Step } from '../database/entities/step.entity.js';
import type { CompiledRevision } from '../deployments/deployments.service.js';
import { parseOverrides } from '../engine/definition.js';
import type { Evaluator } from '../engine/evaluation.js';
import type { HeldOutput } from '../engine/output-memory.js';
import type { OutputLimits } from '../engine/output-meter.js';
import type { RunObserver, RunOutcome, StepResult } from '../engine/runner.js';
import { runGraph } from '../engine/runner.js';
import { AppError, OutputLimitError, toAppError, toErrorCode } from '../errors.js';
import type { StepProgress } from '../event-log/chunk.js';
import { FencedError } from '../event-log/event-log.js';
import type { EventLog, ExecutionEnd, LogWriter } from '../event-log/event-log.js';
import type { Metrics } from '../metrics.js';
import type { ModelRegistry } from '../models/model-registry.js';
import { NO_USAGE } from '../models/usage.js';
import { LockLostError } from '../queue/execution-queue.js';
import type { ClaimedExecution } from './claims.js';
import type { ExecutionEnds } from './ends.js';
import { CancelledError } from './running-executions.js';
import { isCheckpoint } from './status.js';
import type { StepStore } from './step-store.js';

export interface ExecutionRunOptions {
  /** As claimed: its `fence` is this run's. */
  execution: ClaimedExecution;
  revision: CompiledRevision;
  /** Highest sequence in its log. */
  lastSequence: number;
  /** Steps of earlier attempts: the finished ones are not run again. */
  leftSteps: Step[];
  /** Agents that spoke in an earlier attempt without coming to their end. */
  interrupted: string[];
  log: EventLog;
  models: ModelRegistry;
  evaluator: Evaluator;
  steps: StepStore;
  ends: ExecutionEnds;
  metrics: Metrics;
  limits: OutputLimits;
  /** Holds what `leftSteps` said already. */
  held: HeldOutput;
  /** Seconds, where the deployment has no limit of its own. */
  defaultTimeoutS: number;
}

/** One attempt at one execution: runs its graph, writes what happens into its log and its steps, and ends it. */
export class ExecutionRun implements RunObserver {
  private readonly logger = new Logger(ExecutionRun.name);
  private readonly writer: LogWriter;
  private readonly stepRows = new Map<string, Step>();
  private readonly saving = new Set<Promise<void>>();
  private readonly wantsProgress: boolean;
  private failedSave: { error: unknown } | undefined;

  constructor(private readonly options: ExecutionRunOptions) {
    const { execution, log, lastSequence, leftSteps } = options;
    this.writer = log.open({ ...execution, last_sequence: lastSequence });
    this.wantsProgress = execution.input.include.includes('progress');
    for (const step of leftSteps) this.stepRows.set(step.agent_id, step);
  }

  /**
   * Resolves once the end is committed. Rejects with {@link FencedError} if another attempt took over, and with the
   * reason of `letGo` if it was asked to let go; the execution is unfinished then.
   */
  async run({ letGo, cancelled }: { letGo: AbortSignal; cancelled: AbortSignal }): Promise<void> {
    const stop = new AbortController();
    const signals = [letGo, cancelled, this.writer.fenced];
    const onAbort = () => stop.abort(signals.find((signal) => signal.aborted)?.reason);
    signals.forEach((signal) => signal.addEventListener('abort', onAbort));
    if (signals.some((signal) => signal.aborted)) onAbort();
    const timeout = this.startTimeout(stop);
    try {
      // One that ends at once takes nothing back.
      if (!stop.signal.aborted) this.writeRestarts();
      const outcome = await this.runGraph(stop.signal);
      const reason: unknown = stop.signal.reason;
      if (reason instanceof FencedError || reason instanceof LockLostError) throw reason;
      await this.finish(outcome, reason);
    } finally {
      clearTimeout(timeout);
      signals.forEach((signal) => signal.removeEventListener('abort', onAbort));
    }
  }

  stepStarted(agentId: string): void {
    const step: Step = {
      step_id: this.stepRows.get(agentId)?.step_id ?? uuidv7(),
      execution_id: this.options.execution.execution_id,
      agent_id: agentId,
      status: 'running',
      attempt: this.options.execution.attempt,
      output: null,
      error: null,
      code: null,
      input_tokens: 0,
      output_tokens: 0,
      started_at: new Date(),
      finished_at: null,
    };
    this.stepRows.set(agentId, step);
    void this.save(step); // a failure is met before the end, in allSaved
    this.reportProgress(step);
  }

  room(): Promise<void> | undefined {
    return this.writer.drain();
  }

  content(agentId: string, text: string): Promise<void> | undefined {
    if (this.options.revision.graph.answers(agentId)) {
      return this.writer.write({ type: 'content', data: text, agent_id: agentId });
    }
    if (this.wantsProgress) return this.writer.write({ type: 'progress', data: text, agent_id: agentId });
    return this.writer.drain();
  }

  /** Resolves when the step is a checkpoint; nothing waits for an answering agent's but the execution's end. */
  async stepFinished(result: StepResult): Promise<void> {
    const begun = this.stepRows.get(result.agent_id);
    const now = new Date();
    const step: Step = {
      step_id: begun?.step_id ?? uuidv7(),
      execution_id: this.options.execution.execution_id,
      agent_id: result.agent_id,
      status: result.status,
      attempt: this.options.execution.attempt,
      output: result.status === 'skipped' ? null : result.output,
      error: result.error?.message ?? null,
      code: result.error?.code ?? null,
      input_tokens: result.usage.input_tokens,
      output_tokens: result.usage.output_tokens,
      started_at: begun?.started_at ?? now,
      finished_at: now,
    };
    this.stepRows.set(result.agent_id, step);
    this.reportProgress(step);
    // What an agent said must be in the log before its step counts as done: a crash in between would lose it for good.
    const saved = this.save(step, this.writer.flush());
    if (!this.options.revision.graph.answers(result.agent_id)) await saved;
  }

  /** An expected failure is a line; what the upstream said to it may hold contents or keys, so that is for debugging only. */
  defect(error: unknown, agentId?: string): void {
    if (error instanceof OutputLimitError) this.options.metrics.refusedOutputs.inc({ limit: error.limit });
    const fields = { execution_id: this.options.execution.execution_id, agent_id: agentId };
    if (!(error instanceof AppError)) return this.logger.error({ ...fields, err: error });
    this.logger.warn({ ...fields, code: error.code }, error.message);
    if (error.cause) this.logger.debug({ ...fields, err: error.cause });
  }

  private async runGraph(signal: AbortSignal): Promise<RunOutcome> {
    const { execution, revision, models, evaluator, limits, held } = this.options;
    const { graph, runtime_config } = revision;
    const { query, chat_history, runtime_overrides } = execution.input;
    try {
      const overrides = parseOverrides(runtime_overrides, { agents: graph.agents, models });
      const { max_retries, variables } = runtime_config;
      return await runGraph({
        graph,
        input: { query, chat_history, overrides, variables, max_retries },
        models,
        evaluator,
        limits,
        held,
        observer: this,
        completed: this.findCheckpoints(),
        signal,
      });
    } catch (error) {
      if (error instanceof FencedError) throw error;
      this.defect(error);
      const failure = toAppError(error);
      return {
        status: 'error',
        response: '',
        error: { code: failure.code, message: failure.message },
        usage: NO_USAGE,
      };
    }
  }

  /** Says which agents begin again, so that clients drop what they said before. */
  private writeRestarts(): void {
    for (const agent_id of this.options.interrupted) {
      // An agent speaks in one step only, so all that it said after `started` belongs to the interrupted one.
      this.writer.append({ type: 'status', status: 'restarted', agent_id, discard_after: 1 });
    }
  }

  private findCheckpoints(): Map<string, StepResult> {
    const checkpoints = new Map<string, StepResult>();
    for (const step of this.options.leftSteps) {
      if (!isCheckpoint(step)) continue;
      checkpoints.set(step.agent_id, {
        agent_id: step.agent_id,
        status: step.status,
        output: step.output ?? '',
        error: step.code ? { code: toErrorCode(step.code), message: step.error ?? '' } : undefined,
        usage: { input_tokens: step.input_tokens, output_tokens: step.output_tokens },
      });
    }
    return checkpoints;
  }

  private startTimeout(stop: AbortController): NodeJS.Timeout {
    const { reason, remainingMs } = timeLimit(this.options);
    return setTimeout(() => stop.abort(reason), Math.max(0, remainingMs));
  }

  private async finish(outcome: RunOutcome, reason: unknown): Promise<void> {
    await this.allSaved();
    const { execution, revision, ends } = this.options;
    const end = endOf(outcome, reason);
    // An earlier attempt may have said more than this one knows of.
    const isInterrupted = execution.attempt > 1 && end.status !== 'completed';
    if (isInterrupted) await this.writer.flush();
    const known = {
      ...end,
      ...outcome.usage,
      first_chunk_at: this.writer.firstContentAt,
      writer: this.writer,
      isLimited: revision.runtime_config.max_concurrency !== undefined,
    };
    await (isInterrupted
      ? ends.endInterrupted(execution, known)
      : ends.endRun(execution, { ...known, response: outcome.response }));
  }

  /** @param logged resolves once what the step said is in the log, with the sequence of its last chunk */
  private save(step: Step, logged = Promise.resolve(0)): Promise<void> {
    const { steps, execution } = this.options;
    const saved = logged.then((last) => steps.save(step, { fence: execution.fence, logged: last }));
    this.saving.add(saved);
    saved.then(
      () => this.saving.delete(saved),
      (error: unknown) => (this.failedSave ??= { error }),
    );
    return saved;
  }

  private async allSaved(): Promise<void> {
    await Promise.all(this.saving);
    if (this.failedSave) throw this.failedSave.error;
  }

  private reportProgress(step: Step): void {
    if (!this.wantsProgress) return;
    const total = this.options.revision.graph.total_steps;
    const completed = [...this.stepRows.values()].filter(({ status }) => status !== 'running').length;
    const data: StepProgress = {
      step_id: step.step_id,
      agent_id: step.agent_id,
      status: step.status,
      completed_steps: completed,
      total_steps: total,
      progress: completed / total,
    };
    this.writer.append({ type: 'progress', data, agent_id: step.agent_id });
  }
}

export interface TimeLimit {
  reason: AppError;
  remainingMs: number;
}

/** How long an execution may still run, and why it ends after that. The time of earlier attempts counts. */
export function timeLimit({
  execution,
  revision,
  defaultTimeoutS,
}: Pick<ExecutionRunOptions, 'execution' | 'revision' | 'defaultTimeoutS'>): TimeLimit {
  const asked = execution.input.runtime_overrides.timeout;
  const seconds = typeof asked === 'number' ? asked : (revision.runtime_config.timeout ?? defaultTimeoutS);
  const reason = new AppError('timeout', `The execution took longer than its limit of ${seconds} s.`);
  return { reason, remainingMs: seconds * 1000 - execution.spent_ms };
}

function endOf(outcome: RunOutcome, reason: unknown): Pick<ExecutionEnd, 'status' | 'error' | 'code'> {
  switch (outcome.status) {
    case 'completed':
      return { status: 'completed' };
    case 'error':
      return { status: 'error', code: outcome.error?.code, error: outcome.error?.message };
    case 'aborted': {
      if (reason instanceof CancelledError) return { status: 'cancelled' };
      const failure = toAppError(reason);
      return { status: 'error', code: failure.code, error: failure.message };
    }
  }
}

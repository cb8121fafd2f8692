import { setTimeout as sleep } from 'node:timers/promises';
import { Inject, Injectable, Logger } from '@nestjs/common';
import type { OnApplicationBootstrap, OnModuleDestroy } from '@nestjs/common';
import { Pool } from 'pg';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import type { Execution } from '../database/entities/execution.entity.js';
import type { Step } from '../database/entities/step.entity.js';
import { SlowPool } from '../database/slow-pool.js';
import { ClosedError, isUnavailable } from '../database/unavailable.js';
import { DeploymentsService } from '../deployments/deployments.service.js';
import type { CompiledRevision } from '../deployments/deployments.service.js';
import { Evaluator } from '../engine/evaluation.js';
import { OutputMemory } from '../engine/output-memory.js';
import type { HeldOutput } from '../engine/output-memory.js';
import { AppError, toAppError } from '../errors.js';
import { EventLog, FencedError } from '../event-log/event-log.js';
import { Metrics } from '../metrics.js';
import { ModelRegistry } from '../models/model-registry.js';
import { ExecutionQueue, LockLostError, PutOffError } from '../queue/execution-queue.js';
import { Claims } from './claims.js';
import type { ClaimedExecution } from './claims.js';
import { ExecutionEnds } from './ends.js';
import { ExecutionRun, timeLimit } from './execution-run.js';
import type { TimeLimit } from './execution-run.js';
import { LostExecutions } from './lost-executions.js';
import { CancelledError, RunningExecutions } from './running-executions.js';
import { StepStore } from './step-store.js';
import { IS_CHECKPOINT, isCheckpoint } from './status.js';
import { WorkerLeases } from './worker-leases.js';

/** How long an execution waits, beyond the grace period, for a database that is away, to be handed back in order. */
const HAND_BACK_MS = 5000;

/** What an earlier attempt left. Read after the claim, which has waited for that attempt's last write. */
const LAST_SEQUENCE = {
  name: 'execution-last-sequence',
  text: `SELECT last_sequence FROM execution_chunk WHERE execution_id = $1 ORDER BY first_sequence DESC LIMIT 1`,
};
/** How long what the checkpoints of earlier attempts said is. */
const BYTES = {
  name: 'execution-bytes',
  text: `
    SELECT coalesce(sum(octet_length(output::text)), 0)::float8 AS bytes FROM step
     WHERE execution_id = $1 AND status ${IS_CHECKPOINT}`,
};
/** Which of some agents are in the log: an agent may have spoken though the row of its step was lost. */
const SPEAKERS = `
    SELECT agent_id FROM unnest($2::text[]) AS agent (agent_id)
     WHERE EXISTS (SELECT 1 FROM execution_chunk WHERE execution_id = $1
                      AND strpos(chunks, '"agent_id":"' || agent.agent_id || '"') > 0)`;
const STEPS = { name: 'execution-steps', text: 'SELECT * FROM step WHERE execution_id = $1' };

/** How often the end of an execution that met a defect is written, and ms between two tries. */
const END_TRIES = 3;
const END_PAUSE_MS = 200;

/** Takes executions out of the queue and runs them. */
@Injectable()
export class ExecutionsWorker implements OnApplicationBootstrap, OnModuleDestroy {
  private readonly logger = new Logger(ExecutionsWorker.name);
  private readonly shutdown = new AbortController();

  constructor(
    @Inject(CONFIG) private readonly config: ServerConfig,
    private readonly pool: Pool,
    private readonly slowPool: SlowPool,
    private readonly queue: ExecutionQueue,
    private readonly log: EventLog,
    private readonly deployments: DeploymentsService,
    private readonly models: ModelRegistry,
    private readonly evaluator: Evaluator,
    private readonly memory: OutputMemory,
    private readonly steps: StepStore,
    private readonly running: RunningExecutions,
    private readonly ends: ExecutionEnds,
    private readonly claims: Claims,
    private readonly leases: WorkerLeases,
    private readonly lost: LostExecutions,
    private readonly metrics: Metrics,
  ) {}

  onApplicationBootstrap(): void {
    if (this.config.ROLE === 'api') return;
    this.leases.start(() => {
      // What fails here is met again by the sweep.
      this.lost.takeBack().catch((error: unknown) => this.logger.warn(error));
    });
    this.queue.process(
      (executionId, signal) => this.run(executionId, signal),
      this.config.WORKER_CONCURRENCY,
    );
  }

  async onModuleDestroy(): Promise<void> {
    const last = setTimeout(
      () => this.shutdown.abort(new Error('The worker is closed.')),
      this.config.SHUTDOWN_GRACE_MS + HAND_BACK_MS,
    );
    await this.queue.stop(this.config.SHUTDOWN_GRACE_MS);
    clearTimeout(last);
    await this.leases.stop();
  }

  private async run(executionId: string, closing: AbortSignal): Promise<void> {
    const execution = await this.claims.claim(executionId, closing);
    if (!execution) return;
    const lease = this.leases.hold(execution, closing);
    try {
      await this.runClaimed(execution, lease.signal);
    } catch (error) {
      if (isDefect(error) && (await this.endDefective(execution, error))) return;
      throw await this.giveUp(execution, error);
    } finally {
      lease.release();
      this.claims.release(execution);
    }
  }

  private async runClaimed(execution: ClaimedExecution, letGo: AbortSignal): Promise<void> {
    const { execution_id: executionId } = execution;
    const cancelled = this.running.add(execution);
    const held = this.memory.open();
    try {
      if (execution.cancel_requested_at)
        return void (await this.ends.end(execution, { status: 'cancelled' }));
      const revision = await this.findRevision(execution);
      if (revision instanceof AppError) return await this.endWith(execution, revision);
      const limit = timeLimit({ execution, revision, defaultTimeoutS: this.config.EXECUTION_TIMEOUT_S });
      // What is over at its beginning takes nothing back of what earlier attempts said.
      if (limit.remainingMs <= 0) return await this.endWith(execution, limit.reason);
      if (execution.input.on_disconnect === 'cancel') {
        await this.running.cancelWhenAbandoned(executionId, revision.runtime_config.disconnect_grace_ms);
      }
      const signals = [letGo, cancelled];
      if (execution.attempt > 1 && !(await this.takeRoom(execution, { held, limit, signals }))) return;
      const left = await this.findLeftovers(execution);
      const { log, models, evaluator, steps, ends, metrics } = this;
      const { MAX_AGENT_OUTPUT, MAX_EXECUTION_OUTPUT, EXECUTION_TIMEOUT_S } = this.config;
      await new ExecutionRun({
        execution,
        revision,
        ...left,
        interrupted: await this.findInterrupted(execution, { revision, leftSteps: left.leftSteps }),
        log,
        models,
        evaluator,
        steps,
        ends,
        metrics,
        limits: { agent: MAX_AGENT_OUTPUT, execution: MAX_EXECUTION_OUTPUT },
        held,
        defaultTimeoutS: EXECUTION_TIMEOUT_S,
      }).run({
        letGo,
        cancelled,
      });
    } finally {
      held.release();
      this.running.remove(executionId, cancelled);
    }
  }

  private async endWith(execution: Execution, { code, message }: AppError): Promise<void> {
    await this.ends.end(execution, { status: 'error', code, error: message });
  }

  /** Ends an execution that would meet the same defect again. @returns whether it has ended */
  private async endDefective(execution: Execution, defect: unknown): Promise<boolean> {
    this.logger.error({ execution_id: execution.execution_id, err: defect });
    try {
      // What this attempt was writing may come in between, and then the end does not follow it.
      for (let tries = 0; tries < END_TRIES; tries++) {
        const { code, message } = toAppError(defect);
        if (await this.ends.end(execution, { status: 'error', code, error: message })) return true;
        await sleep(END_PAUSE_MS);
      }
    } catch (error) {
      this.logger.error(error);
    }
    return false;
  }

  /**
   * Lets go of an execution that did not come to its end, in order: no reason that this process can tell is a lost worker.
   *
   * @returns what the queue is to be told
   */
  private async giveUp(execution: Execution, reason: unknown): Promise<unknown> {
    const isHandedBack = await this.claims.handBack(execution, this.shutdown.signal);
    // Another attempt owns it, so its job is another worker's: if it is not, the queue has to have it again.
    return reason instanceof FencedError && !isHandedBack ? new LockLostError(reason.message) : reason;
  }

  /** What to run, or why it can't be run: what stopped several workers, or does not compile, would only do so again. */
  private async findRevision({
    counted_losses,
    revision_id,
  }: Execution): Promise<CompiledRevision | AppError> {
    const most = this.config.MAX_LOST_ATTEMPTS;
    if (counted_losses >= most) {
      const times = most === 1 ? 'once' : `${most} times in a row`;
      return new AppError('worker_lost', `Its worker was lost ${times}, and no step came to its end.`);
    }
    return this.deployments.revision(revision_id).catch((error: unknown) => {
      if (error instanceof AppError) return error;
      throw error;
    });
  }

  /**
   * Waits until this process has room for what the checkpoints of earlier attempts said. @returns whether it is to be run: it may be
   * cancelled meanwhile, or run out of time, and has ended then. Rejects with any other reason of `signals`.
   */
  private async takeRoom(
    execution: ClaimedExecution,
    { held, limit, signals }: { held: HeldOutput; limit: TimeLimit; signals: AbortSignal[] },
  ): Promise<boolean> {
    const { rows } = await this.pool.query<{ bytes: number }>({ ...BYTES, values: [execution.execution_id] });
    const begun = performance.now();
    const late = new AbortController();
    const timer = setTimeout(() => late.abort(limit.reason), limit.remainingMs);
    try {
      await held.take(rows[0]?.bytes ?? 0, AbortSignal.any([...signals, late.signal]));
      execution.spent_ms += performance.now() - begun;
      return true;
    } catch (reason) {
      if (reason === limit.reason) await this.endWith(execution, limit.reason);
      else if (reason instanceof CancelledError) await this.ends.end(execution, { status: 'cancelled' });
      else throw reason;
      return false;
    } finally {
      clearTimeout(timer);
    }
  }

  private async findLeftovers({
    execution_id,
    attempt,
  }: Execution): Promise<{ lastSequence: number; leftSteps: Step[] }> {
    if (attempt === 1) return { lastSequence: 1, leftSteps: [] }; // `started` came with the acceptance
    const [position, leftSteps] = await Promise.all([
      this.pool.query<{ last_sequence: number }>({ ...LAST_SEQUENCE, values: [execution_id] }),
      this.pool.query<Step>({ ...STEPS, values: [execution_id] }),
    ]);
    return { lastSequence: position.rows[0]?.last_sequence ?? 0, leftSteps: leftSteps.rows };
  }

  /** Agents that said something in an earlier attempt without coming to their end. */
  private async findInterrupted(
    { execution_id, attempt, input }: Execution,
    { revision, leftSteps }: { revision: CompiledRevision; leftSteps: Step[] },
  ): Promise<string[]> {
    if (attempt === 1) return [];
    const finished = new Set(leftSteps.filter(isCheckpoint).map(({ agent_id }) => agent_id));
    const { graph } = revision;
    const speaks = (agentId: string) => graph.answers(agentId) || input.include.includes('progress');
    const unfinished = [...graph.agents.keys()].filter(
      (agentId) => !finished.has(agentId) && speaks(agentId),
    );
    if (unfinished.length === 0) return [];
    // The whole log is looked through for one that said nothing.
    const statement = { text: SPEAKERS, values: [execution_id, unfinished] };
    const { rows } = await this.slowPool.query<{ agent_id: string }>(statement);
    return rows.map(({ agent_id }) => agent_id);
  }
}

/** Whether an attempt failed for a reason that the next one would meet as well. */
function isDefect(error: unknown): boolean {
  const isPassing = [FencedError, LockLostError, PutOffError, ClosedError].some(
    (kind) => error instanceof kind,
  );
  return !isPassing && !isUnavailable(error);
}

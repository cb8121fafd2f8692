import { setTimeout as sleep } from 'node:timers/promises';
import { Inject, Injectable, Logger } from '@nestjs/common';
import type { OnApplicationBootstrap, OnModuleDestroy } from '@nestjs/common';
import { Pool } from 'pg';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import type { Execution } from '../database/entities/execution.entity.js';
import type { Step } from '../database/entities/step.entity.js';
import { queryAtLength } from '../database/query-at-length.js';
import { isUnavailable, retryWhileUnavailable } from '../database/unavailable.js';
import { DeploymentsService } from '../deployments/deployments.service.js';
import type { CompiledRevision } from '../deployments/deployments.service.js';
import { Evaluator } from '../engine/evaluation.js';
import { AppError } from '../errors.js';
import { EventLog, FencedError } from '../event-log/event-log.js';
import { ModelRegistry } from '../models/model-registry.js';
import { ExecutionQueue, LockLostError } from '../queue/execution-queue.js';
import { ExecutionEnds } from './ends.js';
import { ExecutionRun, timeLimit } from './execution-run.js';
import { RunningExecutions } from './running-executions.js';
import { StepStore } from './step-store.js';
import {
  IS_COMPLETED,
  IS_FINAL,
  IS_QUEUED,
  IS_RUNNING,
  IS_UNFINISHED,
  QUEUED,
  RUNNING,
  isCheckpoint,
} from './status.js';

/** A job can be faster than the commit of its execution. After this long there is no such execution. */
const ROW_WAIT_MS = 10_000;
/** How soon a worker looks again: that commit is a matter of a millisecond, or the database is slow. */
const FIRST_ROW_POLL_MS = 1;
const LAST_ROW_POLL_MS = 100;
/** How long an execution waits, beyond the grace period, for a database that is away, to be handed back in order. */
const HAND_BACK_MS = 5000;

/**
 * Takes the execution: from here on `fence` is its fencing token, and an older attempt can write nothing. It is random and
 * not the number of the attempt, which comes again if PostgreSQL crashes before the claim is on its disk. One that is
 * "running" already has lost its worker; what makes progress between two losses is not what stops its workers. The commit
 * does not wait for the disk, since nobody was told of it: were it lost, the execution would be claimed again. Nor did that of
 * its admission: it counts as admitted from here on in any case.
 */
const CLAIM = {
  name: 'execution-claim',
  text: `
    WITH relaxed AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
    UPDATE execution SET status = ${RUNNING}, held = false, admitted = true, attempt = attempt + 1, fence = 1 + (random() * 2147483646)::int, started_at = coalesce(started_at, now()),
           lost_attempts = CASE
             WHEN status ${IS_QUEUED} THEN lost_attempts
             WHEN EXISTS (SELECT 1 FROM step WHERE step.execution_id = execution.execution_id
                             AND step.attempt = execution.attempt AND step.status ${IS_COMPLETED}) THEN 1
             ELSE lost_attempts + 1
           END
      FROM relaxed
     WHERE execution_id = $1 AND status ${IS_UNFINISHED} RETURNING execution.*`,
};

/** Says that another worker may go on, and that this one was not lost. Nothing, if the execution is not this attempt's any more. */
const HAND_BACK = {
  name: 'execution-hand-back',
  text: `UPDATE execution SET status = ${QUEUED} WHERE execution_id = $1 AND fence = $2 AND status ${IS_RUNNING}`,
};

const HAS_ENDED = {
  name: 'execution-has-ended',
  text: `SELECT 1 FROM execution WHERE execution_id = $1 AND status ${IS_FINAL}`,
};

/** What an earlier attempt left. Read after the claim, which has waited for that attempt's last write. */
const LAST_SEQUENCE = {
  name: 'execution-last-sequence',
  text: `SELECT last_sequence FROM execution_chunk WHERE execution_id = $1 ORDER BY first_sequence DESC LIMIT 1`,
};
/** Which of some agents are in the log: an agent may have spoken though the row of its step was lost. */
const SPEAKERS = `
    SELECT agent_id FROM unnest($2::text[]) AS agent (agent_id)
     WHERE EXISTS (SELECT 1 FROM execution_chunk WHERE execution_id = $1
                      AND strpos(chunks, '"agent_id":"' || agent.agent_id || '"') > 0)`;
const STEPS = { name: 'execution-steps', text: 'SELECT * FROM step WHERE execution_id = $1' };

/** Takes executions out of the queue and runs them. */
@Injectable()
export class ExecutionsWorker implements OnApplicationBootstrap, OnModuleDestroy {
  private readonly logger = new Logger(ExecutionsWorker.name);
  private readonly shutdown = new AbortController();

  constructor(
    @Inject(CONFIG) private readonly config: ServerConfig,
    private readonly pool: Pool,
    private readonly queue: ExecutionQueue,
    private readonly log: EventLog,
    private readonly deployments: DeploymentsService,
    private readonly models: ModelRegistry,
    private readonly evaluator: Evaluator,
    private readonly steps: StepStore,
    private readonly running: RunningExecutions,
    private readonly ends: ExecutionEnds,
  ) {}

  onApplicationBootstrap(): void {
    if (this.config.ROLE === 'api') return;
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
  }

  private async run(executionId: string, letGo: AbortSignal): Promise<void> {
    const execution = await this.claim(executionId, letGo);
    if (!execution) return;
    const cancelled = this.running.add(execution);
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
      const left = await this.findLeftovers(execution);
      const { log, models, evaluator, steps, ends } = this;
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
        defaultTimeoutS: this.config.EXECUTION_TIMEOUT_S,
      }).run({
        letGo,
        cancelled,
      });
    } catch (error) {
      throw await this.giveUp(execution, error);
    } finally {
      this.running.remove(executionId, cancelled);
    }
  }

  private async endWith(execution: Execution, { code, message }: AppError): Promise<void> {
    await this.ends.end(execution, { status: 'error', code, error: message });
  }

  /**
   * Lets go of an execution that did not come to its end. A defect is not handed back in order: met again and again, it
   * counts as a worker that is lost again and again.
   *
   * @returns what the queue is to be told
   */
  private async giveUp(execution: Execution, reason: unknown): Promise<unknown> {
    const isFenced = reason instanceof FencedError;
    const isDefect = !isFenced && !(reason instanceof LockLostError) && !isUnavailable(reason);
    const isHandedBack = !isDefect && (await this.handBack(execution));
    // Another attempt owns it, so its job is another worker's: if it is not, the queue has to have it again.
    return isFenced && !isHandedBack ? new LockLostError(reason.message) : reason;
  }

  /** @returns whether the execution was still this attempt's. If the database is away until the end, its worker counts as lost. */
  private async handBack({ execution_id, fence }: Execution): Promise<boolean> {
    try {
      const { rowCount } = await retryWhileUnavailable(
        () => this.pool.query({ ...HAND_BACK, values: [execution_id, fence] }),
        { signal: this.shutdown.signal, onRetry: (error) => this.logger.debug(error) },
      );
      return rowCount === 1;
    } catch (error) {
      this.logger.warn(error);
      return true;
    }
  }

  private async claim(executionId: string, letGo: AbortSignal): Promise<Execution | undefined> {
    const giveUp = Date.now() + ROW_WAIT_MS;
    for (let delay = FIRST_ROW_POLL_MS; ; delay = Math.min(delay * 1.5, LAST_ROW_POLL_MS)) {
      const { rows } = await this.pool.query<Execution>({ ...CLAIM, values: [executionId] });
      if (rows[0]) return rows[0];
      const { rowCount } = await this.pool.query({ ...HAS_ENDED, values: [executionId] });
      if (rowCount) return undefined;
      if (Date.now() > giveUp) {
        this.logger.warn({ execution_id: executionId }, 'A job without an execution was dropped.');
        return undefined;
      }
      await sleep(delay, undefined, { signal: letGo }).catch(() => letGo.throwIfAborted());
    }
  }

  /** What to run, or why it can't be run: what stopped several workers, or does not compile, would only do so again. */
  private async findRevision({
    lost_attempts,
    revision_id,
  }: Execution): Promise<CompiledRevision | AppError> {
    const most = this.config.MAX_LOST_ATTEMPTS;
    if (lost_attempts >= most) {
      const times = most === 1 ? 'once' : `${most} times in a row`;
      return new AppError('worker_lost', `Its worker was lost ${times}, and no step came to its end.`);
    }
    return this.deployments.revision(revision_id).catch((error: unknown) => {
      if (error instanceof AppError) return error;
      throw error;
    });
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
    const { rows } = await queryAtLength<{ agent_id: string }>(this.pool, statement);
    return rows.map(({ agent_id }) => agent_id);
  }
}

import { setTimeout as sleep } from 'node:timers/promises';
import { Inject, Injectable, Logger } from '@nestjs/common';
import type { OnApplicationBootstrap, OnModuleDestroy } from '@nestjs/common';
import { Pool } from 'pg';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import type { Execution } from '../database/entities/execution.entity.js';
import type { Step } from '../database/entities/step.entity.js';
import { DeploymentsService } from '../deployments/deployments.service.js';
import type { CompiledRevision } from '../deployments/deployments.service.js';
import { AppError } from '../errors.js';
import { EventLog, FencedError } from '../event-log/event-log.js';
import { Metrics } from '../metrics.js';
import { ModelRegistry } from '../models/model-registry.js';
import { ExecutionQueue } from '../queue/execution-queue.js';
import { ExecutionRun, isCheckpoint } from './execution-run.js';
import { RunningExecutions } from './running-executions.js';
import { StepStore } from './step-store.js';

/** A job can be faster than the commit of its execution. After this long there is no such execution. */
const ROW_WAIT_MS = 10_000;
/** How soon a worker looks again: that commit is a matter of a millisecond, or the database is slow. */
const FIRST_ROW_POLL_MS = 1;
const LAST_ROW_POLL_MS = 100;
/** An execution that was taken up this often without an end is given up, since it may be what stops its workers. */
const MOST_ATTEMPTS = 10;
/**
 * Takes the execution: from here on `attempt` is its fencing token, and an older attempt can write nothing. The commit
 * does not wait for the disk, since nobody was told of it: were it lost, the execution would be claimed again.
 */
const CLAIM = {
  name: 'execution-claim',
  text: `
    WITH relaxed AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
    UPDATE execution SET status = 'running', attempt = attempt + 1, started_at = coalesce(started_at, now())
      FROM relaxed
     WHERE execution_id = $1 AND status IN ('queued', 'running') RETURNING execution.*`,
};

const HAS_ENDED = {
  name: 'execution-has-ended',
  text: `SELECT 1 FROM execution WHERE execution_id = $1 AND status NOT IN ('queued', 'running')`,
};

/** What an earlier attempt left. Read after the claim, which has waited for that attempt's last write. */
const LAST_SEQUENCE = {
  name: 'execution-last-sequence',
  text: `SELECT last_sequence FROM execution_chunk WHERE execution_id = $1 ORDER BY first_sequence DESC LIMIT 1`,
};
/** Which of some agents are in the log: an agent may have spoken though the row of its step was lost. */
const SPEAKERS = {
  name: 'execution-speakers',
  text: `
    SELECT agent_id FROM unnest($2::text[]) AS agent (agent_id)
     WHERE EXISTS (SELECT 1 FROM execution_chunk WHERE execution_id = $1
                      AND strpos(chunks, '"agent_id":"' || agent.agent_id || '"') > 0)`,
};
const STEPS = { name: 'execution-steps', text: 'SELECT * FROM step WHERE execution_id = $1' };

/** Takes executions out of the queue and runs them. */
@Injectable()
export class ExecutionsWorker implements OnApplicationBootstrap, OnModuleDestroy {
  private readonly logger = new Logger(ExecutionsWorker.name);

  constructor(
    @Inject(CONFIG) private readonly config: ServerConfig,
    private readonly pool: Pool,
    private readonly queue: ExecutionQueue,
    private readonly log: EventLog,
    private readonly deployments: DeploymentsService,
    private readonly models: ModelRegistry,
    private readonly steps: StepStore,
    private readonly running: RunningExecutions,
    private readonly metrics: Metrics,
  ) {}

  onApplicationBootstrap(): void {
    if (this.config.ROLE === 'api') return;
    this.queue.process(
      (executionId, signal) => this.run(executionId, signal),
      this.config.WORKER_CONCURRENCY,
    );
  }

  async onModuleDestroy(): Promise<void> {
    await this.queue.close(this.config.SHUTDOWN_GRACE_MS);
  }

  private async run(executionId: string, letGo: AbortSignal): Promise<void> {
    const execution = await this.claim(executionId, letGo);
    if (!execution) return;
    const { log, models, steps, metrics } = this;
    const cancelled = this.running.add(execution);
    try {
      const [revision, left] = await Promise.all([
        this.findRevision(execution),
        this.findLeftovers(execution),
      ]);
      if (revision instanceof AppError) {
        const { code, message } = revision;
        await this.running.end(execution, left.lastSequence, { status: 'error', code, error: message });
        return;
      }
      if (execution.input.on_disconnect === 'cancel') {
        await this.running.cancelWhenAbandoned(executionId, revision.runtime_config.disconnect_grace_ms);
      }
      const defaultTimeoutS = this.config.EXECUTION_TIMEOUT_S;
      await new ExecutionRun({
        execution,
        revision,
        ...left,
        interrupted: await this.findInterrupted(execution, { revision, leftSteps: left.leftSteps }),
        log,
        models,
        steps,
        metrics,
        defaultTimeoutS,
      }).run({
        letGo,
        cancelled,
      });
    } catch (error) {
      // Another attempt owns it: there is nothing left to do for this one.
      if (!(error instanceof FencedError)) throw error;
      this.logger.warn(error.message);
    } finally {
      this.running.remove(executionId, cancelled);
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
  private async findRevision({ attempt, revision_id }: Execution): Promise<CompiledRevision | AppError> {
    if (attempt > MOST_ATTEMPTS) {
      return new AppError('worker_lost', `It was taken up ${MOST_ATTEMPTS} times and never came to its end.`);
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
    { execution_id, attempt }: Execution,
    { revision, leftSteps }: { revision: CompiledRevision; leftSteps: Step[] },
  ): Promise<string[]> {
    if (attempt === 1) return [];
    const finished = new Set(leftSteps.filter(isCheckpoint).map(({ agent_id }) => agent_id));
    const unfinished = [...revision.graph.agents.keys()].filter((agentId) => !finished.has(agentId));
    const values = [execution_id, unfinished];
    const { rows } = await this.pool.query<{ agent_id: string }>({ ...SPEAKERS, values });
    return rows.map(({ agent_id }) => agent_id);
  }
}

import { Injectable, Logger } from '@nestjs/common';
import { Pool } from 'pg';
import type { Execution } from '../database/entities/execution.entity.js';
import { SlowPool } from '../database/slow-pool.js';
import { OutputMemory } from '../engine/output-memory.js';
import type { HeldOutput } from '../engine/output-memory.js';
import { EventLog, FencedError } from '../event-log/event-log.js';
import type { ExecutionEnd, LogWriter } from '../event-log/event-log.js';
import { Metrics } from '../metrics.js';
import { ExecutionsAdmission } from './executions.admission.js';
import { CANCELLED, IS_FINAL, IS_RUNNING, isUnbegun } from './status.js';
import type { TerminalStatus } from './status.js';
import { spokenText } from './spoken-text.js';

/**
 * Closes the steps that an earlier attempt left running, as long as the execution is this attempt's. A step without an end
 * is no checkpoint, so one that is closed and whose execution is taken over all the same runs again.
 */
const CLOSE_STEPS = {
  name: 'execution-close-steps',
  text: `
    UPDATE step SET status = ${CANCELLED}, finished_at = $3
      FROM execution
     WHERE step.execution_id = $1 AND step.status ${IS_RUNNING}
       AND execution.execution_id = $1 AND execution.fence = $2`,
};

/** Steps that run for ever: an earlier build left them when it ended an execution whose worker had died. */
const CLOSE_LEFT_STEPS = `
  UPDATE step SET status = ${CANCELLED}, finished_at = left_running.finished_at
    FROM (SELECT step_id, execution.finished_at FROM step JOIN execution USING (execution_id)
           WHERE step.status ${IS_RUNNING} AND execution.status ${IS_FINAL} LIMIT $1) AS left_running
   WHERE step.step_id = left_running.step_id`;
/** Steps that are closed at once. */
const LEFT_STEPS = 10_000;

/** What is left of an execution that no process runs: how far its log goes, what its steps cost, and the order of its agents. */
const LEFTOVERS = {
  name: 'execution-leftovers',
  text: `
    SELECT coalesce((SELECT last_sequence FROM execution_chunk WHERE execution_id = $1
                      ORDER BY first_sequence DESC LIMIT 1), 0) AS last_sequence,
           least((SELECT coalesce(sum(input_tokens), 0) FROM step WHERE execution_id = $1), 2147483647)::int AS input_tokens,
           least((SELECT coalesce(sum(output_tokens), 0) FROM step WHERE execution_id = $1), 2147483647)::int AS output_tokens,
           (SELECT configuration FROM deployment_revision WHERE revision_id = $2) AS configuration`,
};

interface Leftovers {
  last_sequence: number;
  input_tokens: number;
  output_tokens: number;
  configuration: { agents: { agent_id: string }[] } | null;
}

type Left = Pick<ExecutionEnd, 'response' | 'input_tokens' | 'output_tokens'> & { last_sequence: number };

type Reason = Pick<ExecutionEnd, 'status' | 'code' | 'error'>;

/** What a run knows of its own end. */
export interface RunEnd extends ExecutionEnd {
  writer: LogWriter;
  /** Its deployment lets only so many run at once: the place is another one's now. */
  isLimited: boolean;
}

/** Ends executions, and tells other parts of the server about it. */
@Injectable()
export class ExecutionEnds {
  private readonly logger = new Logger(ExecutionEnds.name);
  /** Ends wait for each other, and not for models. */
  private readonly memory: OutputMemory;
  private readonly handlers: ((execution: Execution) => void)[] = [];

  constructor(
    private readonly pool: Pool,
    private readonly slowPool: SlowPool,
    private readonly log: EventLog,
    private readonly admission: ExecutionsAdmission,
    memory: OutputMemory,
    private readonly metrics: Metrics,
  ) {
    this.memory = memory.apart();
  }

  /** A process that dies between an end and its handlers tells nobody, so they are a wake-up only. They must not throw. */
  handle(handler: (execution: Execution) => void): void {
    this.handlers.push(handler);
  }

  /**
   * Ends an execution that no process runs: with the text that is in its log, and with what its steps have cost. Resolves with
   * the status that it ended with, and with nothing if a worker took it over at this moment, which then goes on with it.
   *
   * @param execution as it was when it was taken up, or requested to be cancelled
   */
  async end(execution: Execution, reason: Reason): Promise<TerminalStatus | undefined> {
    try {
      return await this.withLeftovers(execution, ({ last_sequence, ...known }) => {
        const writer = this.log.open({ ...execution, last_sequence });
        return this.endRun(execution, { ...reason, ...known, writer, isLimited: true });
      });
    } catch (error) {
      if (error instanceof FencedError) return undefined;
      throw error;
    }
  }

  /** Ends a run as {@link endRun}, with all that its attempts said and did not take back; everything it said is in its log. */
  endInterrupted(execution: Execution, end: Omit<RunEnd, 'response'>): Promise<TerminalStatus> {
    return this.withLeftovers(execution, ({ response }) => this.endRun(execution, { ...end, response }));
  }

  /**
   * The one way in which an execution ends: closes what earlier attempts left, writes the end, frees its place, and tells the
   * others. `execution` is as it was when it was taken up. Resolves with the status that it ended with. Rejects with
   * {@link FencedError} if another attempt owns the execution.
   */
  async endRun(execution: Execution, { writer, isLimited, ...end }: RunEnd): Promise<TerminalStatus> {
    const { execution_id, fence, attempt, created_at } = execution;
    if (attempt > 1) await this.pool.query({ ...CLOSE_STEPS, values: [execution_id, fence, new Date()] });
    const state = await writer.finish(end);
    this.metrics.executions.inc({ state });
    this.metrics.executionDuration.observe({ state }, (Date.now() - created_at.getTime()) / 1000);
    if (end.first_chunk_at) {
      const seconds = (end.first_chunk_at.getTime() - created_at.getTime()) / 1000;
      this.metrics.timeToFirstChunk.observe(seconds);
    }
    if (isLimited) this.admission.release(execution.deployment_id);
    this.handlers.forEach((handler) => handler(execution));
    return state;
  }

  /** Closes what earlier builds left running of executions that have ended, until `signal` aborts. */
  async closeLeftSteps(signal: AbortSignal): Promise<void> {
    for (let closed = LEFT_STEPS; closed === LEFT_STEPS && !signal.aborted;) {
      const statement = { text: CLOSE_LEFT_STEPS, values: [LEFT_STEPS] };
      closed = (await this.slowPool.query(statement)).rowCount ?? 0;
      if (closed > 0) this.logger.log({ steps: closed }, 'Steps of ended executions were closed.');
    }
  }

  /** What an unfinished execution left, for as long as `work` takes. */
  private async withLeftovers<Result>(
    execution: Execution,
    work: (left: Left) => Promise<Result>,
  ): Promise<Result> {
    const held = this.memory.open();
    try {
      return await work(await this.leftovers(execution, held));
    } finally {
      held.release();
    }
  }

  private async leftovers(execution: Execution, held: HeldOutput): Promise<Left> {
    const { execution_id, revision_id } = execution;
    // `started` came with the acceptance.
    if (isUnbegun(execution)) return { last_sequence: 1, response: '', input_tokens: 0, output_tokens: 0 };
    const { rows } = await this.pool.query<Leftovers>({ ...LEFTOVERS, values: [execution_id, revision_id] });
    const [left] = rows;
    if (!left) throw new Error(`The leftovers of the execution ${execution_id} can't be read.`);
    const { configuration, ...rest } = left;
    const order = configuration?.agents.map(({ agent_id }) => agent_id) ?? [];
    return { ...rest, response: await spokenText(this.log.stored(execution_id), { order, held }) };
  }
}

import { Injectable } from '@nestjs/common';
import type { Response } from 'express';
import { Pool } from 'pg';
import { validate as isUuid } from 'uuid';
import type { Execution } from '../database/entities/execution.entity.js';
import { AppError, toErrorCode } from '../errors.js';
import { EventLog } from '../event-log/event-log.js';
import { ExecutionEnds } from './ends.js';
import { ExecutionsAcceptance } from './executions.acceptance.js';
import { ExecutionAcceptedDto, ExecutionDto, executionLinks } from './executions.dto.js';
import type { ExecuteDto, ExecuteResponseDto } from './executions.dto.js';
import { ExecutionsReader } from './executions.reader.js';
import type { ExecutionResult } from './executions.reader.js';
import { RunningExecutions } from './running-executions.js';
import { Subscribers, onceOver } from './subscribers.js';
import { untilFinal } from './until-final.js';
import { IS_UNFINISHED, isFinal, isUnbegun } from './status.js';

const REQUEST_CANCEL = {
  name: 'execution-request-cancel',
  text: `
    UPDATE execution SET cancel_requested_at = coalesce(cancel_requested_at, now())
     WHERE execution_id = $1 AND status ${IS_UNFINISHED} RETURNING *`,
};

const STATUS = { name: 'execution-status', text: 'SELECT status FROM execution WHERE execution_id = $1' };

/** Runs executions for those who wait for them, and cancels them. */
@Injectable()
export class ExecutionsService {
  constructor(
    private readonly pool: Pool,
    private readonly acceptance: ExecutionsAcceptance,
    private readonly log: EventLog,
    private readonly reader: ExecutionsReader,
    private readonly running: RunningExecutions,
    private readonly ends: ExecutionEnds,
    private readonly subscribers: Subscribers,
  ) {}

  /** Runs a deployment and waits for its end. Rejects as {@link ExecutionsAcceptance.accept} does, and with the error that ended the run. */
  async execute(
    request: ExecuteDto,
    { idempotencyKey, response }: { idempotencyKey?: string; response: Response },
  ): Promise<ExecuteResponseDto> {
    const gone = new AbortController();
    onceOver(response, () => gone.abort());
    const { execution_id, status } = await this.acceptance.accept(request, idempotencyKey);
    nameExecution(response, execution_id);
    this.subscribers.followUntilOver(execution_id, response);
    if (!isFinal(status)) {
      for await (const batch of this.log.read(execution_id, 0, { signal: gone.signal })) {
        if (batch.terminal) break;
      }
    }
    return resultOf(await this.reader.result(execution_id));
  }

  /** Accepts an execution that the caller does not wait for. */
  async executeAsync(
    request: ExecuteDto,
    { idempotencyKey, response }: { idempotencyKey?: string; response: Response },
  ): Promise<ExecutionAcceptedDto> {
    const accepted = await this.acceptance.accept(request, idempotencyKey);
    const links = executionLinks(accepted.execution_id);
    response.setHeader('Content-Location', links.self);
    response.setHeader('Location', links.self);
    return ExecutionAcceptedDto.from(accepted);
  }

  /**
   * Ends an execution as `cancelled`, whatever it would have ended as. Answers when it has ended, so that no step begins
   * after that; or after a moment, if the worker that runs it does not answer. Cancelling again changes nothing. Rejects with
   * `execution_finished` once it ended otherwise, and with `execution_not_found`.
   */
  async cancel(executionId: string): Promise<ExecutionDto> {
    if (isUuid(executionId)) {
      const { rows } = await this.pool.query<Execution>({ ...REQUEST_CANCEL, values: [executionId] });
      const [requested] = rows;
      // One that was taken up before has more than its first chunk; the worker that gets it ends it.
      if (requested && isUnbegun(requested)) {
        await this.ends.end(requested, { status: 'cancelled' });
      }
      if (requested) {
        this.running.cancel([requested.execution_id]);
        await untilFinal(() => this.hasEnded(executionId));
      }
    }
    const execution = await this.reader.get(executionId);
    if (execution.status === 'completed' || execution.status === 'error') {
      throw new AppError('execution_finished', `The execution ended as "${execution.status}" before.`);
    }
    return execution;
  }

  private async hasEnded(executionId: string): Promise<boolean> {
    const { rows } = await this.pool.query<Pick<Execution, 'status'>>({ ...STATUS, values: [executionId] });
    return !rows[0] || isFinal(rows[0].status);
  }
}

/**
 * Names an execution in the headers of an answer: where it can be read, and where its stream can be followed. Nest ends the
 * answer at once when its client leaves during the acceptance.
 */
export function nameExecution(response: Response, executionId: string): void {
  if (response.headersSent) return;
  const links = executionLinks(executionId);
  response.setHeader('Content-Location', links.self);
  response.setHeader('Location', links.stream);
}

/** Throws what ended the execution, if it is not `completed`. */
function resultOf(execution: ExecutionResult): ExecuteResponseDto {
  const { execution_id, status, deployment_name, workflow_id, deployment_id } = execution;
  if (status === 'cancelled') throw new AppError('cancelled', `The execution ${execution_id} was cancelled.`);
  if (status === 'error')
    throw new AppError(toErrorCode(execution.code ?? ''), execution.error ?? 'The execution failed.');
  if (status !== 'completed') {
    throw new AppError(
      'unavailable',
      `The server stopped waiting for the execution ${execution_id}, which goes on.`,
      { retryAfter: 1 },
    );
  }
  const finished = execution.finished_at ?? new Date();
  return {
    status: 'success',
    response: execution.response ?? '',
    execution_id,
    deployment_name,
    workflow_id,
    deployment_id,
    usage: { input_tokens: execution.input_tokens, output_tokens: execution.output_tokens },
    duration_ms: finished.getTime() - execution.created_at.getTime(),
    timestamp: finished,
  };
}

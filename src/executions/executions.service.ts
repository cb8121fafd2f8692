import { Injectable, Logger } from '@nestjs/common';
import type { Response } from 'express';
import { Pool } from 'pg';
import { v7 as uuidv7, validate as isUuid } from 'uuid';
import type { ExecutionInput } from '../database/entities/configuration.js';
import type { Execution } from '../database/entities/execution.entity.js';
import { DeploymentsService } from '../deployments/deployments.service.js';
import { parseOverrides } from '../engine/definition.js';
import { AppError, toErrorCode } from '../errors.js';
import { ChunkSerializer } from '../event-log/chunk.js';
import { EventLog } from '../event-log/event-log.js';
import { Metrics } from '../metrics.js';
import { ModelRegistry } from '../models/model-registry.js';
import { ExecutionQueue } from '../queue/execution-queue.js';
import { ExecutionDto, executionLinks } from './executions.dto.js';
import type { ExecuteDto, ExecuteResponseDto, ExecutionAcceptedDto } from './executions.dto.js';
import { ExecutionsReader } from './executions.reader.js';
import { RunningExecutions } from './running-executions.js';

/** The row and its first chunk: an execution whose acceptance is committed has a log that begins with `started`. */
const ACCEPT = {
  name: 'execution-accept',
  text: `
    WITH accepted AS (
      INSERT INTO execution (execution_id, deployment_id, deployment_name, environment, workflow_id, revision_id, status,
                             input, created_at)
      VALUES ($1, $2, $3, $4, $5, $6, 'queued', $7, $8) RETURNING execution_id)
    INSERT INTO execution_chunk (execution_id, first_sequence, last_sequence, chunks)
    SELECT execution_id, 1, 1, $9 FROM accepted`,
};

const REQUEST_CANCEL = {
  name: 'execution-request-cancel',
  text: `
    UPDATE execution SET cancel_requested_at = coalesce(cancel_requested_at, now())
     WHERE execution_id = $1 AND status IN ('queued', 'running') RETURNING *`,
};

/** Accepts executions, waits for them and cancels them. */
@Injectable()
export class ExecutionsService {
  private readonly logger = new Logger(ExecutionsService.name);

  constructor(
    private readonly pool: Pool,
    private readonly deployments: DeploymentsService,
    private readonly queue: ExecutionQueue,
    private readonly log: EventLog,
    private readonly models: ModelRegistry,
    private readonly metrics: Metrics,
    private readonly reader: ExecutionsReader,
    private readonly running: RunningExecutions,
  ) {}

  /** Runs a deployment and waits for its end. Rejects as {@link accept} does, and with the error that ended the run. */
  async execute(request: ExecuteDto, response: Response): Promise<ExecuteResponseDto> {
    const gone = new AbortController();
    response.once('close', () => gone.abort());
    const { execution_id } = await this.accept(request, response);
    return this.result(execution_id, gone.signal);
  }

  /** Accepts an execution that the caller does not wait for. */
  async executeAsync(request: ExecuteDto, response: Response): Promise<ExecutionAcceptedDto> {
    const accepted = await this.accept(request, response);
    response.setHeader('Location', accepted.links.self);
    return accepted;
  }

  /**
   * Commits an execution, puts it into the queue and names it in the answer's headers. Rejects with
   * `deployment_not_found` or `override_not_allowed`. The row decides: an execution whose way into the queue failed is
   * put there by the workers' sweep.
   */
  async accept(request: ExecuteDto, response: Response): Promise<ExecutionAcceptedDto> {
    const deployment = await this.deployments.findActive(request.deployment_name, request.environment);
    const { graph, runtime_config } = await this.deployments.revision(deployment.revision_id);
    const input: ExecutionInput = {
      query: request.query,
      chat_history: request.chat_history ?? [],
      runtime_overrides: request.runtime_overrides ?? {},
      include: request.include ?? [],
    };
    parseOverrides(input.runtime_overrides, {
      agents: graph.agents,
      allowed: runtime_config.allowed_overrides,
      models: this.models,
    });

    const { deployment_id, deployment_name, environment, workflow_id, revision_id } = deployment;
    const execution_id = uuidv7();
    const created_at = new Date();
    const started = { type: 'status', status: 'started' } as const;
    const serializer = new ChunkSerializer({ deployment_name, workflow_id, execution_id });
    const chunk = serializer.serialize(started, 1, created_at.getTime());
    const inserted = this.pool.query({
      ...ACCEPT,
      values: [
        execution_id,
        deployment_id,
        deployment_name,
        environment,
        workflow_id,
        revision_id,
        JSON.stringify(input),
        created_at,
        chunk,
      ],
    });
    // At the same time, since a worker that is faster than the commit waits for it.
    this.queue.add(execution_id).catch((error: unknown) => this.logger.error(error));
    await inserted;
    this.metrics.executions.inc({ state: 'queued' });
    const links = executionLinks(execution_id);
    response.setHeader('Content-Location', links.self);
    response.setHeader('Location', links.stream);
    return { execution_id, status: 'queued', deployment_name, workflow_id, deployment_id, created_at, links };
  }

  private async result(executionId: string, signal: AbortSignal): Promise<ExecuteResponseDto> {
    for await (const batch of this.log.read(executionId, 0, { signal })) if (batch.terminal) break;
    const stopped = new AppError('unavailable', 'The server stopped waiting for the execution.', {
      retryAfter: 1,
    });
    if (signal.aborted) throw stopped;
    const execution = await this.reader.find(executionId);
    const { status, deployment_name, workflow_id, deployment_id, response, error, code } = execution;
    if (status === 'cancelled')
      throw new AppError('cancelled', `The execution ${executionId} was cancelled.`);
    if (status === 'error') throw new AppError(toErrorCode(code ?? ''), error ?? 'The execution failed.');
    if (status !== 'completed')
      throw new AppError('unavailable', 'The server stopped waiting for the execution.');
    const finished = execution.finished_at ?? new Date();
    return {
      status: 'success',
      response: response ?? '',
      execution_id: executionId,
      deployment_name,
      workflow_id,
      deployment_id,
      usage: { input_tokens: execution.input_tokens, output_tokens: execution.output_tokens },
      duration_ms: finished.getTime() - execution.created_at.getTime(),
      timestamp: finished,
    };
  }

  /**
   * Asks for an end as `cancelled`. Cancelling again changes nothing. Rejects with `execution_finished` once it ended
   * otherwise, and with `execution_not_found`.
   */
  async cancel(executionId: string): Promise<ExecutionDto> {
    if (isUuid(executionId)) {
      const { rows } = await this.pool.query<Execution>({ ...REQUEST_CANCEL, values: [executionId] });
      const [requested] = rows;
      if (requested?.status === 'queued') await this.running.end(requested, 1, { status: 'cancelled' });
      if (requested) this.running.cancel(executionId);
    }
    const execution = await this.reader.find(executionId);
    if (execution.status === 'completed' || execution.status === 'error') {
      throw new AppError('execution_finished', `The execution ended as "${execution.status}" before.`);
    }
    return ExecutionDto.from(execution);
  }
}

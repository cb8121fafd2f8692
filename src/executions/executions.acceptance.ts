import { Injectable, Logger } from '@nestjs/common';
import { Pool } from 'pg';
import { v7 as uuidv7 } from 'uuid';
import type { ExecutionInput, RuntimeConfig } from '../database/entities/configuration.js';
import type { Execution } from '../database/entities/execution.entity.js';
import { DeploymentsService } from '../deployments/deployments.service.js';
import type { ActiveDeployment } from '../deployments/deployments.service.js';
import { OVERRIDES_REFUSED, checkOverrides } from '../engine/definition.js';
import { refuse } from '../engine/validation.js';
import { AppError } from '../errors.js';
import type { Fault } from '../errors.js';
import { ChunkSerializer } from '../event-log/chunk.js';
import { Metrics } from '../metrics.js';
import { ModelRegistry } from '../models/model-registry.js';
import { ExecutionQueue } from '../queue/execution-queue.js';
import { ROW_WAIT_MS } from './claims.js';
import { ExecutionsAdmission } from './executions.admission.js';
import type { AcceptedExecution, ExecuteDto } from './executions.dto.js';
import { QUEUED } from './status.js';

/** Printable ASCII: what every HTTP library sends and returns unchanged. */
const KEY_PATTERN = /^[\x20-\x7e]{1,255}$/;

/**
 * The row and its first chunk: an execution whose acceptance is committed has a log that begins with `started`. Nothing
 * is written if another execution has the idempotency key; one that is just being accepted is waited for.
 */
const ACCEPT = {
  name: 'execution-accept',
  text: `
    WITH accepted AS (
      INSERT INTO execution (execution_id, deployment_id, deployment_name, environment, workflow_id, revision_id, status,
                             input, created_at, idempotency_key, admitted)
      VALUES ($1, $2, $3, $4, $5, $6, ${QUEUED}, $7, $8, $9, $11)
          ON CONFLICT (idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
      RETURNING execution_id)
    INSERT INTO execution_chunk (execution_id, first_sequence, last_sequence, chunks)
    SELECT execution_id, 1, 1, $10 FROM accepted`,
};

const FIND_BY_KEY = {
  name: 'execution-find-by-key',
  text: `
    SELECT execution_id, status, deployment_id, deployment_name, workflow_id, input, created_at, batch_id
      FROM execution WHERE idempotency_key = $1`,
};

/** Takes in what clients want to run. */
@Injectable()
export class ExecutionsAcceptance {
  private readonly logger = new Logger(ExecutionsAcceptance.name);

  constructor(
    private readonly pool: Pool,
    private readonly deployments: DeploymentsService,
    private readonly queue: ExecutionQueue,
    private readonly admission: ExecutionsAdmission,
    private readonly models: ModelRegistry,
    private readonly metrics: Metrics,
  ) {}

  /**
   * Commits an execution and puts it into the queue. The row decides: an execution whose way into the queue failed is put
   * there by the workers' sweep. A request that repeats an earlier one with its `idempotencyKey` gets that one's execution.
   * Rejects with `deployment_not_found`, `override_not_allowed`, `idempotency_key_invalid`, `idempotency_key_reused` or `queue_full`.
   */
  async accept(request: ExecuteDto, idempotencyKey?: string): Promise<AcceptedExecution> {
    const earlier = await this.findEarlier(request, idempotencyKey);
    if (earlier) return earlier;
    const asked = [{ overrides: request.runtime_overrides, pointer: '' }];
    const { deployment, runtime_config, faults } = await this.check(request, asked);
    refuse('override_not_allowed', OVERRIDES_REFUSED, faults);
    const input = inputOf(request);
    await this.admission.takePlaces(1);

    const { deployment_id, deployment_name, environment, workflow_id, revision_id } = deployment;
    // Those of a deployment with a limit are put into the queue by their admission.
    const admitted = runtime_config.max_concurrency === undefined;
    const execution_id = uuidv7();
    const created_at = new Date();
    const serializer = new ChunkSerializer({ deployment_name, workflow_id, execution_id });
    const started = serializer.serialize({ type: 'status', status: 'started' }, 1, created_at.getTime());
    const values = [execution_id, deployment_id, deployment_name, environment, workflow_id, revision_id];
    const inserted = this.pool.query({
      ...ACCEPT,
      values: [...values, JSON.stringify(input), created_at, idempotencyKey, started, admitted],
    });
    // At the same time, since a worker that is faster than the commit waits for it; with a key there may be no commit.
    if (admitted && idempotencyKey === undefined) this.enqueue(execution_id, inserted);
    const { rowCount } = await inserted;
    // The same request won the race for the key, and is there to be found now.
    if (rowCount === 0) return this.accept(request, idempotencyKey);
    if (!admitted) this.admission.release(deployment_id);
    else if (idempotencyKey !== undefined) this.enqueue(execution_id, inserted);
    this.metrics.executions.inc({ state: 'queued' });
    return { execution_id, status: 'queued', deployment_name, workflow_id, deployment_id, created_at };
  }

  /**
   * Finds the deployment that is asked for, and checks runtime overrides against it: the faults of all of them have their
   * `pointer` in front. Rejects with `deployment_not_found`.
   */
  async check(
    request: Pick<ExecuteDto, 'deployment_name' | 'environment'>,
    asked: { overrides: unknown; pointer: string }[],
  ): Promise<{ deployment: ActiveDeployment; runtime_config: RuntimeConfig; faults: Fault[] }> {
    const deployment = await this.deployments.findActive(request.deployment_name, request.environment);
    const { graph, runtime_config } = await this.deployments.revision(deployment.revision_id);
    const rules = { agents: graph.agents, allowed: runtime_config.allowed_overrides, models: this.models };
    const faults = asked.flatMap(
      ({ overrides, pointer }) => checkOverrides(overrides, `${pointer}/runtime_overrides`, rules).faults,
    );
    return { deployment, runtime_config, faults };
  }

  /** The execution that has this key, if any; a batch has it through its first item. Rejects with `idempotency_key_invalid`. */
  async findByKey(idempotencyKey: string | undefined): Promise<KeyedExecution | undefined> {
    if (idempotencyKey === undefined) return undefined;
    if (!KEY_PATTERN.test(idempotencyKey)) {
      throw new AppError(
        'idempotency_key_invalid',
        'Idempotency-Key must have 1 to 255 printable ASCII characters, such as a UUID.',
      );
    }
    const { rows } = await this.pool.query<KeyedExecution>({ ...FIND_BY_KEY, values: [idempotencyKey] });
    return rows[0];
  }

  /** A worker drops a job whose execution is not there after a while: one that came late is queued again. One that failed is taken back. */
  private enqueue(executionId: string, inserted: Promise<unknown>): void {
    const report = (error: unknown) => this.logger.error(error);
    const added = this.queue.add([executionId]);
    added.catch(report);
    const begun = performance.now();
    inserted.then(
      () => {
        if (performance.now() - begun > ROW_WAIT_MS / 2) this.queue.add([executionId]).catch(report);
      },
      () => added.then(() => this.queue.remove([executionId])).catch(report),
    );
  }

  private async findEarlier(
    request: ExecuteDto,
    idempotencyKey: string | undefined,
  ): Promise<AcceptedExecution | undefined> {
    const earlier = await this.findByKey(idempotencyKey);
    if (!earlier || isRequestOf(earlier, request)) return earlier;
    return refuseKey(earlier);
  }
}

/** What has an idempotency key. */
export type KeyedExecution = AcceptedExecution & Pick<Execution, 'input' | 'batch_id'>;

/** Says that the key belongs to another request. */
export function refuseKey({ execution_id, batch_id }: KeyedExecution): never {
  const owner = batch_id === null ? `execution ${execution_id}` : `batch ${batch_id}`;
  throw new AppError(
    'idempotency_key_reused',
    `Idempotency-Key belongs to the ${owner}, which was asked something else. Use a new key for a new request.`,
  );
}

/** Whether an execution was made by a request with this body. */
export function isRequestOf(
  execution: Pick<Execution, 'deployment_name' | 'input' | 'batch_id'>,
  request: ExecuteDto,
): boolean {
  return (
    execution.batch_id === null &&
    execution.deployment_name === request.deployment_name &&
    canonical(execution.input) === canonical(inputOf(request))
  );
}

/** What is kept of a request, with what it leaves out. */
export function inputOf(request: Omit<ExecuteDto, 'deployment_name'>): ExecutionInput {
  return {
    environment: request.environment,
    query: request.query,
    chat_history: request.chat_history ?? [],
    runtime_overrides: request.runtime_overrides ?? {},
    include: request.include ?? [],
    on_disconnect: request.on_disconnect,
  };
}

/** The same text for the same JSON value, in whatever order its members are. */
export function canonical(value: unknown): string {
  return JSON.stringify(value, (_key, part: unknown) =>
    typeof part === 'object' && part !== null && !Array.isArray(part)
      ? Object.fromEntries(Object.entries(part).toSorted(([one], [other]) => (one < other ? -1 : 1)))
      : part,
  );
}

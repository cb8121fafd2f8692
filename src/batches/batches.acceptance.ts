import { createHash } from 'node:crypto';
import { Inject, Injectable, Logger } from '@nestjs/common';
import { Pool } from 'pg';
import type { PoolClient } from 'pg';
import { v7 as uuidv7 } from 'uuid';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import type { Batch } from '../database/entities/batch.entity.js';
import type { ExecutionInput } from '../database/entities/configuration.js';
import { withClient } from '../database/with-client.js';
import { OVERRIDES_REFUSED } from '../engine/definition.js';
import { refuse } from '../engine/validation.js';
import type { ActiveDeployment } from '../deployments/deployments.service.js';
import { AppError } from '../errors.js';
import type { Fault } from '../errors.js';
import { serializeBatchChunk } from '../event-log/chunk-lines.js';
import { ChunkSerializer } from '../event-log/chunk.js';
import { ExecutionsAcceptance, canonical, inputOf, refuseKey } from '../executions/executions.acceptance.js';
import { ExecutionsAdmission } from '../executions/executions.admission.js';
import { QUEUED, RUNNING } from '../executions/status.js';
import { Metrics } from '../metrics.js';
import { ExecutionQueue } from '../queue/execution-queue.js';
import { DEFAULT_CONCURRENCY, batchLinks } from './batches.dto.js';
import type { BatchAcceptedDto, BatchExecutionDto, ExecuteBatchDto } from './batches.dto.js';

/**
 * The batch, its items as executions, and the first chunk of each of them, in one statement. $10 is the idempotency key,
 * which is the first item's; where another request has it, one execution too few is inserted.
 */
const ACCEPT = {
  name: 'batch-accept',
  text: `
    WITH item AS MATERIALIZED (
      SELECT *, (index - 1)::int AS batch_index
        FROM unnest($11::uuid[], $12::text[], $13::text[], $14::text[]) WITH ORDINALITY
             AS item (execution_id, item_id, input, started, index)
    ), accepted AS (
      INSERT INTO batch (batch_id, deployment_id, deployment_name, environment, workflow_id, request_hash, concurrency,
                         on_item_error, status, created_at)
      VALUES ($1, $2, $3, $4, $5, $7, $8, $9, ${RUNNING}, $15)
    ), logged AS (
      INSERT INTO execution_chunk (execution_id, first_sequence, last_sequence, chunks)
      SELECT $1, 1, 1, $16 UNION ALL SELECT execution_id, 1, 1, started FROM item
    )
    INSERT INTO execution (execution_id, deployment_id, deployment_name, environment, workflow_id, revision_id, status, input,
                           created_at, idempotency_key, batch_id, batch_index, item_id, held, admitted)
    SELECT execution_id, $2, $3, $4, $5, $6, ${QUEUED}, input::json, $15, CASE WHEN batch_index = 0 THEN $10 END,
           $1, batch_index, item_id, batch_index >= $8, $17 AND batch_index < $8
      FROM item ORDER BY batch_index
        ON CONFLICT (idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING`,
};

const FIND = { name: 'batch-find', text: 'SELECT * FROM batch WHERE batch_id = $1' };

const EXECUTIONS = {
  name: 'batch-executions',
  text: 'SELECT item_id, execution_id FROM execution WHERE batch_id = $1 ORDER BY batch_index',
};

/** What is written of a batch. */
interface NewBatch {
  batch_id: string;
  items: (BatchExecutionDto & { input: ExecutionInput })[];
  concurrency: number;
  /** The deployment has no limit of its own. */
  admitted: boolean;
  created_at: Date;
}

/** Takes in batches. */
@Injectable()
export class BatchesAcceptance {
  private readonly logger = new Logger(BatchesAcceptance.name);

  constructor(
    private readonly pool: Pool,
    private readonly executions: ExecutionsAcceptance,
    private readonly admission: ExecutionsAdmission,
    private readonly queue: ExecutionQueue,
    private readonly metrics: Metrics,
    @Inject(CONFIG) private readonly config: ServerConfig,
  ) {}

  /**
   * Commits all items of a batch, or none of them, and puts the first ones into the queue. A request that repeats an earlier
   * one with its `idempotencyKey` gets that one's batch. Rejects with `validation_failed`, `deployment_not_found`,
   * `override_not_allowed` (each with every bad item), `idempotency_key_invalid`, `idempotency_key_reused` or `queue_full`.
   */
  async accept(request: ExecuteBatchDto, idempotencyKey?: string): Promise<BatchAcceptedDto> {
    const itemIds = request.items.map(({ item_id }, index) => item_id ?? String(index));
    const repeated = findRepeated(itemIds);
    const earlier = await this.findEarlier(request, idempotencyKey);
    if (earlier) return earlier;
    const { deployment, runtime_config, faults } = await this.executions.check(request, overridesOf(request));
    if (repeated.length > 0) refuse('validation_failed', 'The items are not valid', [...repeated, ...faults]);
    refuse('override_not_allowed', OVERRIDES_REFUSED, faults);
    await this.takePlaces(itemIds.length);
    const batch: NewBatch = {
      batch_id: uuidv7(),
      items: request.items.map((item, index) => ({
        item_id: itemIds[index] ?? '',
        execution_id: uuidv7(),
        input: inputOf({ ...item, environment: request.environment, include: request.include }),
      })),
      concurrency: request.concurrency ?? DEFAULT_CONCURRENCY,
      admitted: runtime_config.max_concurrency === undefined,
      created_at: new Date(),
    };
    const values = valuesOf(batch, { request, deployment, idempotencyKey });
    // The same request won the race for the key, and is there to be found now.
    if (!(await withClient(this.pool, (client) => insert(client, values, itemIds.length)))) {
      return this.accept(request, idempotencyKey);
    }
    this.begin(batch, deployment.deployment_id);
    return acceptedOf(batch.batch_id, batch.items);
  }

  /** Throws `invalid_cursor` if a request with another body made the batch. */
  refuseOther(request: ExecuteBatchDto, batch: Batch): void {
    if (batch.request_hash !== hashOf(request)) {
      throw new AppError(
        'invalid_cursor',
        'Last-Event-ID belongs to a batch of another request. Leave the header out to begin a new one.',
      );
    }
  }

  private async takePlaces(places: number): Promise<void> {
    if (places > this.config.MAX_QUEUED) {
      throw new AppError(
        'validation_failed',
        `The batch has ${places} items, and this server lets ${this.config.MAX_QUEUED} executions wait at most. Send smaller ones.`,
        { faults: [{ pointer: '/items', detail: `must have at most ${this.config.MAX_QUEUED} items here` }] },
      );
    }
    await this.admission.takePlaces(places);
  }

  private async findEarlier(
    request: ExecuteBatchDto,
    idempotencyKey: string | undefined,
  ): Promise<BatchAcceptedDto | undefined> {
    const execution = await this.executions.findByKey(idempotencyKey);
    if (!execution) return undefined;
    const { rows } = await this.pool.query<Batch>({ ...FIND, values: [execution.batch_id] });
    const [batch] = rows;
    if (batch?.request_hash !== hashOf(request)) refuseKey(execution);
    const items = await this.pool.query<BatchExecutionDto>({ ...EXECUTIONS, values: [batch.batch_id] });
    return acceptedOf(batch.batch_id, items.rows);
  }

  private begin({ items, concurrency, admitted }: NewBatch, deploymentId: string): void {
    this.metrics.executions.inc({ state: 'queued' }, items.length);
    if (!admitted) return this.admission.release(deploymentId);
    const first = items.slice(0, concurrency).map(({ execution_id }) => execution_id);
    // If that fails, the workers' sweep finds them.
    this.queue.add(first).catch((error: unknown) => this.logger.error(error));
  }
}

async function insert(client: PoolClient, values: unknown[], items: number): Promise<boolean> {
  await client.query('BEGIN');
  const { rowCount } = await client.query({ ...ACCEPT, values });
  const isWhole = rowCount === items;
  await client.query(isWhole ? 'COMMIT' : 'ROLLBACK');
  return isWhole;
}

function valuesOf(
  { batch_id, items, concurrency, admitted, created_at }: NewBatch,
  {
    request,
    deployment,
    idempotencyKey,
  }: { request: ExecuteBatchDto; deployment: ActiveDeployment; idempotencyKey: string | undefined },
): unknown[] {
  const { deployment_id, deployment_name, environment, workflow_id, revision_id } = deployment;
  const time = created_at.getTime();
  const started = { type: 'status', status: 'started' } as const;
  const origin = { deployment_name, workflow_id, batch_id };
  const data = {
    items: items.map(({ item_id, execution_id }) => ({ item_id, execution_id })),
  };
  return [
    batch_id,
    deployment_id,
    deployment_name,
    environment,
    workflow_id,
    revision_id,
    hashOf(request),
    concurrency,
    request.on_item_error ?? 'continue',
    idempotencyKey,
    items.map(({ execution_id }) => execution_id),
    items.map(({ item_id }) => item_id),
    items.map(({ input }) => JSON.stringify(input)),
    items.map(({ execution_id, item_id }) =>
      new ChunkSerializer({ ...origin, execution_id, item_id }).serialize(started, 1, time),
    ),
    created_at,
    serializeBatchChunk(new ChunkSerializer(origin), { ...started, data }, { sequence: 1, time }),
    admitted,
  ];
}

function acceptedOf(batchId: string, items: BatchExecutionDto[]): BatchAcceptedDto {
  const executions = items.map(({ item_id, execution_id }) => ({ item_id, execution_id }));
  return { batch_id: batchId, executions, links: batchLinks(batchId) };
}

/** The same text for the same request. What was left out stays out: another default would make it another request. */
function hashOf(request: ExecuteBatchDto): string {
  const { deployment_name, environment, items, include, concurrency, on_item_error } = request;
  const asked = {
    deployment_name,
    environment,
    include: include ?? [],
    concurrency,
    on_item_error,
    items: items.map((item) => ({ item_id: item.item_id, ...inputOf(item) })),
  };
  return createHash('sha256').update(canonical(asked)).digest('hex');
}

function overridesOf(request: ExecuteBatchDto): { overrides: unknown; pointer: string }[] {
  return request.items.map(({ runtime_overrides }, index) => ({
    overrides: runtime_overrides,
    pointer: `/items/${index}`,
  }));
}

function findRepeated(itemIds: string[]): Fault[] {
  const firsts = new Map<string, number>();
  return itemIds.flatMap((itemId, index) => {
    const first = firsts.get(itemId);
    if (first === undefined) firsts.set(itemId, index);
    const detail = `must be unique in a batch, and item ${first} has it already`;
    return first === undefined ? [] : [{ pointer: `/items/${index}/item_id`, detail }];
  });
}

import { ApiProperty, ApiPropertyOptional, PickType } from '@nestjs/swagger';
import {
  ArrayMinSize,
  IsIn,
  IsInt,
  IsOptional,
  IsString,
  Max,
  MaxLength,
  Min,
  MinLength,
} from 'class-validator';
import type { Batch } from '../database/entities/batch.entity.js';
import type { Execution } from '../database/entities/execution.entity.js';
import { IsStorableText, ListOf, QueryInteger } from '../dto.js';
import { ExecuteDto, FailureDto, UsageDto, executionLinks } from '../executions/executions.dto.js';
import { BATCH_STATUSES, EXECUTION_STATUSES } from '../executions/status.js';
import type { BatchStatus, ExecutionStatus } from '../executions/status.js';

/** Items of a batch at most; so many may be in the queue and running at once, too. */
export const MOST_ITEMS = 1000;
/** A batch leaves workers to others, unless it says otherwise. */
export const DEFAULT_CONCURRENCY = 50;

/** One execution of a batch. */
export class BatchItemDto extends PickType(ExecuteDto, ['query', 'chat_history', 'runtime_overrides']) {
  /**
   * Your name for the item, unique within the batch; without it, its index
   * @example invoice-17
   */
  @IsOptional()
  @IsString()
  @MinLength(1)
  @MaxLength(200)
  @IsStorableText()
  item_id?: string;
}

/** Many executions of one deployment. */
export class ExecuteBatchDto extends PickType(ExecuteDto, ['deployment_name', 'environment', 'include']) {
  /** What to run: each item is an execution of its own. All are accepted, or none */
  @ArrayMinSize(1)
  @ListOf(() => BatchItemDto, MOST_ITEMS)
  @ApiProperty({
    type: [BatchItemDto],
    minItems: 1,
    maxItems: MOST_ITEMS,
    example: [{ item_id: 'one', query: 'Say one' }, { query: 'Say two' }],
  })
  items: BatchItemDto[];

  /** How many items are in the queue and running at once, at most; they begin in their order */
  @IsOptional()
  @IsInt()
  @Min(1)
  @Max(MOST_ITEMS)
  @ApiPropertyOptional({ default: DEFAULT_CONCURRENCY })
  concurrency?: number;

  /**
   * After an item that ended with an error: `continue` runs the others all the same; `stop` lets those finish that run, and
   * begins no other one: they end as `cancelled`
   */
  @IsOptional()
  @IsIn(['continue', 'stop'])
  @ApiPropertyOptional({ default: 'continue' })
  on_item_error?: 'continue' | 'stop';
}

/** Where a batch can be watched and stopped, and its results be read. */
export class BatchLinksDto {
  self: string;
  stream: string;
  results: string;
  cancel: string;
}

/** An item and the execution that it is. */
export class BatchExecutionDto {
  /** Your name for it, or its index. */
  item_id: string;
  execution_id: string;
}

/** An accepted batch. */
export class BatchAcceptedDto {
  batch_id: string;
  /** In the order of the items. */
  executions: BatchExecutionDto[];
  links: BatchLinksDto;
}

/** How many items there are, and how many of them are in each state. */
export class ItemCountsDto {
  total: number;
  queued: number;
  running: number;
  completed: number;
  error: number;
  cancelled: number;
}

/** An item's state and, once it has ended, its result. */
export class BatchResultDto {
  /** Its place in the request, from 0. */
  index: number;
  item_id: string;
  execution_id: string;
  @ApiProperty({ enum: EXECUTION_STATUSES })
  status: ExecutionStatus;
  /** What the answering agents said; after a failure or a cancellation the text so far. */
  response?: string;
  error?: FailureDto;
  usage: UsageDto;
  /** From acceptance to the end, in ms. */
  duration_ms?: number;
  /** The address of the execution. */
  self: string;

  /** Reads an item's row as clients see it; fields without a value are left out. */
  static from(row: Execution): BatchResultDto {
    return {
      index: row.batch_index ?? 0,
      item_id: row.item_id ?? '',
      execution_id: row.execution_id,
      status: row.status,
      response: row.response ?? undefined,
      error: row.code ? { code: row.code, message: row.error ?? '' } : undefined,
      usage: { input_tokens: row.input_tokens, output_tokens: row.output_tokens },
      duration_ms: row.finished_at ? row.finished_at.getTime() - row.created_at.getTime() : undefined,
      self: executionLinks(row.execution_id).self,
    };
  }
}

/** A batch: how far it is, and a page of its items. */
export class BatchDto {
  batch_id: string;
  deployment_id: string;
  deployment_name: string;
  environment: string;
  workflow_id: string;
  /** `completed` once all items have ended, however they did; `cancelled` if a client cancelled it. */
  @ApiProperty({ enum: BATCH_STATUSES })
  status: BatchStatus;
  counts: ItemCountsDto;
  /** The share of items that have ended, from 0 to 1. */
  progress: number;
  concurrency: number;
  @ApiProperty({ enum: ['continue', 'stop'] })
  on_item_error: 'continue' | 'stop';
  created_at: Date;
  finished_at?: Date;
  cancel_requested_at?: Date;
  links: BatchLinksDto;
  /** In the order of the request. */
  items: BatchResultDto[];
  /** Pass it as `cursor` to read on; absent on the last page. */
  next_cursor?: string;

  /** Reads a batch's row as clients see it. */
  static from(
    row: Batch,
    { counts, items, next_cursor }: Pick<BatchDto, 'counts' | 'items' | 'next_cursor'>,
  ): BatchDto {
    return {
      batch_id: row.batch_id,
      deployment_id: row.deployment_id,
      deployment_name: row.deployment_name,
      environment: row.environment,
      workflow_id: row.workflow_id,
      status: row.status,
      counts,
      progress: (counts.completed + counts.error + counts.cancelled) / counts.total,
      concurrency: row.concurrency,
      on_item_error: row.on_item_error,
      created_at: row.created_at,
      finished_at: row.finished_at ?? undefined,
      cancel_requested_at: row.cancel_requested_at ?? undefined,
      links: batchLinks(row.batch_id),
      items,
      next_cursor,
    };
  }
}

/** Which items to show with a batch. */
export class BatchQueryDto {
  /** Items to show, at most */
  @IsOptional()
  @QueryInteger()
  @IsInt()
  @Min(1)
  @Max(MOST_ITEMS)
  limit: number = 100;

  /** `next_cursor` of the page before */
  @IsOptional()
  @QueryInteger()
  @IsInt()
  @Min(0)
  @Max(MOST_ITEMS)
  cursor?: number;
}

/** Where a batch's stream shall begin, when the client can't send `Last-Event-ID`. */
export class BatchStreamQueryDto {
  /** Position of the last event that the client has: the number behind the colon of its id; 0 or nothing replays all */
  @IsOptional()
  @QueryInteger()
  @IsInt()
  @Min(0)
  @Max(2_147_483_647)
  after?: number;
}

/** The addresses of a batch, relative to the server. */
export function batchLinks(batchId: string): BatchLinksDto {
  const self = `/api/batches/${batchId}`;
  return { self, stream: `${self}/stream`, results: `${self}/results`, cancel: `${self}/cancel` };
}

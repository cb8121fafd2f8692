import { ApiProperty } from '@nestjs/swagger';
import { EXECUTION_STATUSES } from '../database/entities/execution.entity.js';
import type { Chunk, ChunkContent, ChunkStatus } from '../event-log/chunk.js';
import type {
  SnapshotDeployment,
  SnapshotExecution,
  StatusChange,
  StatusSnapshot,
} from '../status-events/status-event.js';

/** `data` of `chunk`: the same text as the `data:` line of the event stream. */
export class ChunkDto implements Chunk {
  @ApiProperty({ enum: ['status', 'content', 'progress'] })
  type: ChunkContent['type'];

  /** `content`: a piece of text. `progress`: a step's state, or a piece of an intermediate agent's text. The ends of a batch: its items */
  @ApiProperty({
    oneOf: [{ type: 'string' }, { type: 'object', additionalProperties: true }],
    required: false,
  })
  data?: Chunk['data'];

  /** `started` is the first chunk; one of `completed`, `error` and `cancelled` is the last one, exactly once */
  @ApiProperty({ enum: ['started', 'restarted', 'completed', 'error', 'cancelled'], required: false })
  status?: ChunkStatus;

  /** With the status `error`: what went wrong */
  error?: string;
  /** With the status `error`: one of docs/errors.md */
  code?: string;
  deployment_name: string;
  workflow_id: string;
  /** Absent in the two chunks of a batch itself */
  execution_id?: string;
  /** The batch that the execution is an item of */
  batch_id?: string;
  item_id?: string;

  /** 1, 2, 3 … without gaps within an execution */
  @ApiProperty({ type: 'integer', minimum: 1 })
  sequence: number;

  agent_id?: string;

  /** With the status `restarted`: content of `agent_id` with a higher `sequence`, up to this chunk, is void */
  @ApiProperty({ type: 'integer', required: false })
  discard_after?: number;

  @ApiProperty({ format: 'date-time' })
  timestamp: string;
}

/** An unfinished execution at the moment of a snapshot. */
export class SnapshotExecutionDto implements SnapshotExecution {
  execution_id: string;
  deployment_id: string;
  deployment_name: string;
  environment: string;
  workflow_id: string;
  @ApiProperty({ enum: EXECUTION_STATUSES })
  status: (typeof EXECUTION_STATUSES)[number];
  @ApiProperty({ type: 'integer' })
  attempts: number;
  created_at: Date;
  started_at?: Date;
}

/** A deployment at the moment of a snapshot. */
export class SnapshotDeploymentDto implements SnapshotDeployment {
  deployment_id: string;
  deployment_name: string;
  environment: string;
  workflow_id: string;
  @ApiProperty({ enum: ['active', 'inactive'] })
  status: SnapshotDeployment['status'];
  @ApiProperty({ type: 'integer' })
  execution_count: number;
  @ApiProperty({ type: 'integer' })
  success_count: number;
  @ApiProperty({ type: 'integer' })
  error_count: number;
  @ApiProperty({ type: 'integer' })
  cancelled_count: number;
  last_executed_at?: Date;
}

/** `data` of the first `status` of a stream: how things are at one moment. */
export class StatusSnapshotDto implements StatusSnapshot {
  @ApiProperty({ enum: ['snapshot'] })
  type: 'snapshot';
  /** The changes that follow begin right after it */
  @ApiProperty({ type: 'integer' })
  sequence: number;
  timestamp: Date;
  @ApiProperty({ type: 'integer' })
  queued: number;
  @ApiProperty({ type: 'integer' })
  running: number;
  /** The newest unfinished ones */
  executions: SnapshotExecutionDto[];
  deployments?: SnapshotDeploymentDto[];
}

/** `data` of a later `status`: one change. */
export class StatusChangeDto implements StatusChange {
  @ApiProperty({ enum: ['execution', 'deployment'] })
  type: 'execution' | 'deployment';
  deployment_id: string;
  deployment_name: string;
  environment: string;
  workflow_id: string;
  /** Absent if it is the deployment's status */
  execution_id?: string;
  /** Of an execution as in its state; of a deployment `active`, `inactive` or `deleted` */
  status: string;
  @ApiProperty({ type: 'integer', required: false })
  attempts?: number;
  code?: string;
  /** Ascends with gaps */
  @ApiProperty({ type: 'integer' })
  sequence: number;
  timestamp: Date;
}

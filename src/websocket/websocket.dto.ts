import { ApiProperty, ApiPropertyOptional, PickType } from '@nestjs/swagger';
import { ArrayMaxSize, IsArray, IsIn, IsInt, IsString, Max, MaxLength, Min } from 'class-validator';
import { EXECUTION_STATUSES } from '../executions/status.js';
import type { ExecutionStatus } from '../executions/status.js';
import { IsStorableText, MayBeAbsent } from '../dto.js';
import type { Chunk, ChunkContent, ChunkStatus } from '../event-log/chunk.js';
import { ExecuteDto } from '../executions/executions.dto.js';
import { ProblemDto } from '../problem.dto.js';
import type {
  SnapshotDeployment,
  SnapshotExecution,
  StatusChange,
  StatusSnapshot,
} from '../status-events/status-event.js';

/** Where the WebSocket is. */
export const WEBSOCKET_PATH = '/api/ws';

/** What a client may send as `event`. */
export const REQUEST_EVENTS = ['execute', 'subscribe', 'unsubscribe', 'cancel', 'ping'] as const;

/** What the server sends as `event`. */
export const ANSWER_EVENTS = [
  'accepted',
  'subscribed',
  'unsubscribed',
  'cancelled',
  'pong',
  'chunk',
  'status',
  'end',
  'error',
] as const;

export type RequestEvent = (typeof REQUEST_EVENTS)[number];
export type AnswerEvent = (typeof ANSWER_EVENTS)[number];

/** What a client calls its message; what it causes comes back with it. */
export type MessageId = string | number;

/** A message of a client, whose `data` was not looked at yet. */
export interface ClientMessage {
  event: RequestEvent;
  id?: MessageId;
  data?: unknown;
}

/** `data` of `execute`: the body of `POST /api/workflows/execute/stream`, and its `Idempotency-Key`. */
export class ExecuteMessageDto extends ExecuteDto {
  /** The same key and data get the same execution, which runs once: 1 to 255 printable ASCII characters, such as a UUID */
  @MayBeAbsent()
  @IsString()
  idempotency_key?: string;
}

/** One of them says which stream is meant. */
export class StreamTargetDto {
  /** An execution: its chunks */
  @MayBeAbsent()
  @IsString()
  @IsStorableText()
  execution_id?: string;

  /** A batch: the chunks of all its items */
  @MayBeAbsent()
  @IsString()
  @IsStorableText()
  batch_id?: string;

  /** A deployment: its status and that of its executions */
  @MayBeAbsent()
  @IsString()
  @MaxLength(200)
  @IsStorableText()
  deployment_name?: string;

  /** With `deployment_name`, where several environments have it: which one. Without it `production` comes first */
  @MayBeAbsent()
  @IsString()
  @MaxLength(200)
  @IsStorableText()
  environment?: string;
}

/** Each of them, and some repeated. */
const MOST_STATUSES = 100;

/** `data` of `subscribe`. */
export class SubscribeDto extends StreamTargetDto {
  /** `after` of the last frame that the client has; without it a stream begins at its beginning, that of a deployment with a snapshot */
  @MayBeAbsent()
  @IsInt()
  @Min(0)
  @Max(Number.MAX_SAFE_INTEGER)
  @ApiProperty({ type: 'integer', minimum: 0, required: false })
  after?: number;

  /** With `deployment_name`: only changes of executions to one of these */
  @MayBeAbsent()
  @IsArray()
  @ArrayMaxSize(MOST_STATUSES)
  @IsIn(EXECUTION_STATUSES, { each: true })
  @ApiProperty({ type: 'array', items: { type: 'string', enum: [...EXECUTION_STATUSES] }, required: false })
  status?: ExecutionStatus[];
}

/** `data` of `unsubscribe`. */
export class UnsubscribeDto extends StreamTargetDto {}

/** `data` of `cancel`; one of them says what is meant. */
export class CancelDto extends PickType(StreamTargetDto, ['execution_id', 'batch_id']) {}

/** `data` of `ping`: nothing. */
export class PingDto {}

/** `data` of `subscribed`. */
export class SubscribedDto extends StreamTargetDto {
  /** As it was asked for; of an execution or a batch 0 where it was not. Changes after it that are not kept any more come as a snapshot */
  @ApiProperty({ type: 'integer', minimum: 0, required: false })
  after?: number;
}

/** `data` of `unsubscribed` and of `end`. */
export class StreamNameDto extends StreamTargetDto {}

/** `data` of `pong`: nothing. */
export class PongDto {}

/** `data` of `error`: the problem document of HTTP. */
export class MessageProblemDto extends ProblemDto {
  /** Seconds after which a repeat may succeed; the header `Retry-After` of HTTP */
  @ApiPropertyOptional({ type: 'integer' })
  retry_after?: number;
}

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
  status: ExecutionStatus;
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
  /** The newest unfinished ones, as many as fit into 48 KiB */
  executions: SnapshotExecutionDto[];
  deployments?: SnapshotDeploymentDto[];
  /** There are more than it holds */
  @ApiProperty({ enum: [true], required: false })
  items_omitted?: true;
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

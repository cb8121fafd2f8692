import { ApiProperty, ApiPropertyOptional, PickType } from '@nestjs/swagger';
import { IsArray, IsIn, IsInt, IsString, Max, MaxLength, Min } from 'class-validator';
import { EXECUTION_STATUSES } from '../database/entities/execution.entity.js';
import { IsStorableText, MayBeAbsent } from '../dto.js';
import { ExecuteDto } from '../executions/executions.dto.js';
import { ProblemDto } from '../problem.dto.js';

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
  @IsIn(EXECUTION_STATUSES, { each: true })
  @ApiProperty({ type: 'array', items: { type: 'string', enum: [...EXECUTION_STATUSES] }, required: false })
  status?: (typeof EXECUTION_STATUSES)[number][];
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

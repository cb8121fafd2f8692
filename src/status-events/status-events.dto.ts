import { ApiProperty } from '@nestjs/swagger';
import { Transform } from 'class-transformer';
import { IsIn, IsInt, IsOptional, IsString, IsUUID, Max, Min } from 'class-validator';
import { EXECUTION_STATUSES } from '../executions/status.js';
import type { ExecutionStatus } from '../executions/status.js';
import { IsStorableText, QueryInteger } from '../dto.js';

/** From where on changes of status are sent, and which. */
class EventsQueryDto {
  /** Only changes of executions to one of these, separated by commas */
  @IsOptional()
  @Transform(({ value }: { value: unknown }) => (typeof value === 'string' ? value.split(',') : value))
  @IsIn(EXECUTION_STATUSES, { each: true })
  @ApiProperty({
    type: 'array',
    items: { type: 'string', enum: [...EXECUTION_STATUSES] },
    required: false,
    style: 'form',
    explode: false,
  } as object)
  status?: ExecutionStatus[];

  /** Sequence of the last event that the client has, when it can't send `Last-Event-ID`; without either, a snapshot comes first */
  @IsOptional()
  @QueryInteger()
  @IsInt()
  @Min(0)
  @Max(Number.MAX_SAFE_INTEGER)
  after?: number;
}

/** Which changes of a deployment to send, and from where on. */
export class DeploymentEventsQueryDto extends EventsQueryDto {
  /** Where several environments have this name: which one. Without it `production` comes first */
  @IsOptional()
  @IsString()
  @IsStorableText()
  environment?: string;
}

/** Which changes of executions to send, and from where on. */
export class ExecutionEventsQueryDto extends EventsQueryDto {
  @IsOptional()
  @IsString()
  @IsStorableText()
  deployment_name?: string;

  @IsOptional()
  @IsString()
  @IsStorableText()
  environment?: string;

  @IsOptional()
  @IsUUID()
  workflow_id?: string;
}

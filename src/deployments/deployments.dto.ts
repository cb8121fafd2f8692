import { ApiProperty } from '@nestjs/swagger';
import {
  ArrayMaxSize,
  IsArray,
  IsIn,
  IsInt,
  IsNumber,
  IsOptional,
  IsString,
  IsUUID,
  Length,
  Matches,
  Max,
  Min,
} from 'class-validator';
import type { WorkflowConfiguration } from '../database/entities/configuration.js';
import { AsGiven, IsMoment, IsStorableText, Nested, QueryInteger } from '../dto.js';
import { OVERRIDE_FIELDS } from '../engine/definition.js';
import { supportDesk, supportDeskId } from '../workflows/example.js';
import { WorkflowConfigurationDto } from '../workflows/workflows.dto.js';

/** What a deployment can be called. */
export const DEPLOYMENT_NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$/;
/** What an environment can be called. */
export const ENVIRONMENT = /^[a-z0-9][a-z0-9_-]{0,49}$/;

const DEPLOYMENT_NAME_RULE =
  'deployment_name must be 1 to 100 letters, digits, dots, underscores or hyphens, and begin with a letter or digit';
const ENVIRONMENT_RULE =
  'environment must be 1 to 50 small letters, digits, underscores or hyphens, and begin with a letter or digit';
const STATUSES = ['active', 'inactive'] as const;

/** How executions of a deployment run. */
export class RuntimeConfigDto {
  /** Seconds that an execution may take */
  @IsOptional()
  @IsNumber({ allowNaN: false, allowInfinity: false })
  @Min(0.001)
  @Max(86_400)
  @ApiProperty({ type: Number, required: false, minimum: 0.001, maximum: 86_400, example: 120 })
  timeout?: number;

  /** How often a model call that failed before its first token is repeated */
  @IsOptional()
  @IsInt()
  @Min(0)
  @Max(10)
  @ApiProperty({ type: 'integer', required: false, minimum: 0, maximum: 10, example: 2 })
  max_retries?: number;

  /** How many executions may run at once, in all processes together; the others wait in the order of their arrival */
  @IsOptional()
  @IsInt()
  @Min(1)
  @Max(100_000)
  @ApiProperty({ type: 'integer', required: false, minimum: 1, maximum: 100_000, example: 20 })
  max_concurrency?: number;

  /** How long an execution with `on_disconnect: "cancel"` goes on without a subscriber, in ms */
  @IsOptional()
  @IsInt()
  @Min(0)
  @Max(3_600_000)
  @ApiProperty({ type: 'integer', required: false, minimum: 0, maximum: 3_600_000, default: 5000 })
  disconnect_grace_ms?: number;

  /** The runtime overrides that requests may use; all of them if it is left out */
  @IsOptional()
  @IsArray()
  @ArrayMaxSize(OVERRIDE_FIELDS.length)
  @IsIn(OVERRIDE_FIELDS, { each: true })
  @ApiProperty({
    enum: OVERRIDE_FIELDS,
    isArray: true,
    required: false,
    example: ['temperature', 'max_tokens', 'variables'],
  })
  allowed_overrides?: string[];

  /** For templates and expressions; those of a request go before them */
  @IsOptional()
  @AsGiven()
  @ApiProperty({
    type: 'object',
    additionalProperties: true,
    selfRequired: false,
    example: { product: 'Agent Studio' },
  })
  variables?: Record<string, unknown>;
}

/** Under which name, where and how a workflow shall be executable. */
export class DeployWorkflowDto {
  /** The name that requests use; unique in its environment */
  @Matches(DEPLOYMENT_NAME, { message: DEPLOYMENT_NAME_RULE })
  @ApiProperty({ example: 'my-support-desk', pattern: DEPLOYMENT_NAME.source })
  deployment_name: string;

  @IsOptional()
  @Matches(ENVIRONMENT, { message: ENVIRONMENT_RULE })
  @ApiProperty({ required: false, default: 'production', example: 'staging', pattern: ENVIRONMENT.source })
  environment?: string;

  /** Who deploys it */
  @IsOptional()
  @IsString()
  @Length(1, 200)
  @IsStorableText()
  @ApiProperty({ required: false, minLength: 1, maxLength: 200, example: 'release-pipeline' })
  deployed_by?: string;

  @IsOptional()
  @Nested(() => RuntimeConfigDto)
  @ApiProperty({ type: RuntimeConfigDto, required: false })
  runtime_config?: RuntimeConfigDto;
}

/** A workflow made executable under a name in an environment. */
export class DeploymentDto {
  @ApiProperty({ format: 'uuid' })
  deployment_id: string;

  @ApiProperty({ example: supportDesk.name })
  deployment_name: string;

  @ApiProperty({ example: 'production' })
  environment: string;

  @ApiProperty({ format: 'uuid', example: supportDeskId })
  workflow_id: string;

  /** Absent once the workflow is deleted */
  @ApiProperty({ required: false, example: supportDesk.name })
  workflow_name?: string;

  /** Changes with each deployment under this name */
  @ApiProperty({ format: 'uuid' })
  revision_id: string;

  @ApiProperty({ enum: STATUSES })
  status: 'active' | 'inactive';

  @ApiProperty({ required: false })
  deployed_by?: string;

  deployed_at: Date;

  @ApiProperty({ required: false })
  stopped_at?: Date;

  /** Executions that have ended */
  @ApiProperty({ type: 'integer' })
  execution_count: number;

  @ApiProperty({ type: 'integer' })
  success_count: number;

  @ApiProperty({ type: 'integer' })
  error_count: number;

  @ApiProperty({ type: 'integer' })
  cancelled_count: number;

  /** When an execution ended last */
  @ApiProperty({ required: false })
  last_executed_at?: Date;

  @ApiProperty({ required: false })
  last_error?: string;

  @ApiProperty({ required: false })
  last_error_at?: Date;
}

/** A deployment with what it runs. */
export class DeploymentDetailsDto extends DeploymentDto {
  /** The workflow's configuration at the time of the deployment */
  @ApiProperty({ type: WorkflowConfigurationDto, example: supportDesk.configuration })
  configuration: WorkflowConfiguration;

  @ApiProperty({ type: RuntimeConfigDto })
  runtime_config: RuntimeConfigDto;
}

/** A page of deployments, newest names first. */
export class DeploymentPageDto {
  @ApiProperty({ type: [DeploymentDto] })
  items: DeploymentDto[];

  /** Pass it as `cursor` to read on; absent on the last page */
  @ApiProperty({ required: false })
  next_cursor?: string;
}

/** Which of the deployments of one name. */
export class EnvironmentDto {
  /** In which environment the deployment is. Without it, `production` comes first, then the newest */
  @IsOptional()
  @Matches(ENVIRONMENT, { message: ENVIRONMENT_RULE })
  @ApiProperty({ type: String, required: false, pattern: ENVIRONMENT.source })
  environment?: string;
}

/** Which deployments to list. */
export class ListDeploymentsDto {
  /** Only those of one environment */
  @IsOptional()
  @Matches(ENVIRONMENT, { message: ENVIRONMENT_RULE })
  @ApiProperty({ type: String, required: false, pattern: ENVIRONMENT.source })
  environment?: string;

  /** Only active ones, or only stopped ones */
  @IsOptional()
  @IsIn(STATUSES)
  @ApiProperty({ enum: STATUSES, required: false })
  status?: 'active' | 'inactive';

  /** How many to answer with at most */
  @QueryInteger()
  @IsInt()
  @Min(1)
  @Max(1000)
  @ApiProperty({ type: 'integer', required: false, default: 100, minimum: 1, maximum: 1000 })
  limit: number = 100;

  /** `next_cursor` of the page before */
  @IsOptional()
  @IsUUID()
  @ApiProperty({ type: String, required: false })
  cursor?: string;
}

/** The statistics of which time, and in which steps. */
export class StatisticsQueryDto extends EnvironmentDto {
  /** Executions that ended at or after this moment (ISO 8601, with an offset or Z) */
  @IsOptional()
  @IsMoment()
  @ApiProperty({ type: String, required: false })
  from?: string;

  /** Executions that ended before this moment */
  @IsOptional()
  @IsMoment()
  @ApiProperty({ type: String, required: false })
  to?: string;

  /** The steps of the time series, in UTC */
  @IsIn(['minute', 'hour', 'day'])
  @ApiProperty({ enum: ['minute', 'hour', 'day'], required: false, default: 'hour' })
  bucket: 'minute' | 'hour' | 'day' = 'hour';
}

/** The median and the 95th percentile of a duration, in ms; absent where nothing was measured. */
export class BucketPercentilesDto {
  @ApiProperty({ required: false })
  p50?: number;

  @ApiProperty({ required: false })
  p95?: number;
}

/** Percentiles of a duration, in ms; absent where nothing was measured. */
export class PercentilesDto extends BucketPercentilesDto {
  @ApiProperty({ required: false })
  p99?: number;
}

/** Tokens as the providers counted them. */
export class TokenUsageDto {
  @ApiProperty({ type: 'integer' })
  input_tokens: number;

  @ApiProperty({ type: 'integer' })
  output_tokens: number;
}

/** An execution that failed. */
export class LastErrorDto {
  message: string;
  at: Date;
}

/** One step of a time series. */
export class StatisticsBucketDto extends TokenUsageDto {
  bucket_start: Date;

  @ApiProperty({ type: 'integer' })
  execution_count: number;

  @ApiProperty({ type: 'integer' })
  success_count: number;

  @ApiProperty({ type: 'integer' })
  error_count: number;

  @ApiProperty({ type: 'integer' })
  cancelled_count: number;

  @ApiProperty({ type: BucketPercentilesDto })
  duration_ms: BucketPercentilesDto;
}

/** How the executions of a deployment that have ended went. */
export class StatisticsDto {
  deployment_id: string;
  deployment_name: string;
  environment: string;

  /** As it was asked for; absent if the totals go back to the first execution */
  @ApiProperty({ required: false })
  from?: Date;

  /** As it was asked for, or now */
  to: Date;

  @ApiProperty({ type: 'integer' })
  execution_count: number;

  @ApiProperty({ type: 'integer' })
  success_count: number;

  @ApiProperty({ type: 'integer' })
  error_count: number;

  @ApiProperty({ type: 'integer' })
  cancelled_count: number;

  /** `error_count / execution_count`, from 0 to 1; 0 without executions */
  error_rate: number;

  @ApiProperty({ required: false })
  last_executed_at?: Date;

  @ApiProperty({ type: LastErrorDto, required: false })
  last_error?: LastErrorDto;

  /** From acceptance to the end, of executions that were not cancelled */
  @ApiProperty({ type: PercentilesDto })
  duration_ms: PercentilesDto;

  /** From acceptance to the first text */
  @ApiProperty({ type: PercentilesDto })
  time_to_first_chunk_ms: PercentilesDto;

  @ApiProperty({ type: TokenUsageDto })
  usage: TokenUsageDto;

  /** Oldest first and without gaps. Without `from`, the last 60 steps */
  @ApiProperty({ type: [StatisticsBucketDto] })
  series: StatisticsBucketDto[];
}

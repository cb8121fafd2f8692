import { ApiProperty, PartialType } from '@nestjs/swagger';
import { Transform } from 'class-transformer';
import {
  IsBoolean,
  IsInt,
  IsOptional,
  IsString,
  Length,
  Matches,
  Max,
  MaxLength,
  Min,
} from 'class-validator';
import type { WorkflowConfiguration } from '../database/entities/configuration.js';
import { AsGiven, IsStorableText, QueryBoolean, QueryInteger } from '../dto.js';
import { supportDesk, supportDeskId } from './example.js';

const MAX_OFFSET = 2_147_483_647;

/** One agent of a graph. */
export class AgentDto {
  /** Its name within the graph */
  @ApiProperty({ example: 'triage' })
  agent_id: string;

  /** What kind of agent it is */
  @ApiProperty({ example: 'llm', description: 'What kind of agent it is: `llm` or `template`' })
  agent_type: string;

  /** What people call it; other agents' prompts mention it under this name */
  name?: string;

  /** Where an editor draws it; kept as it is */
  @ApiProperty({ type: 'object', additionalProperties: true, selfRequired: false })
  position?: Record<string, unknown>;

  /**
   * `llm`: `model` (`provider/model`), `system_prompt` (a Liquid template), `temperature`, `max_tokens`, `top_p`,
   * `frequency_penalty`, `presence_penalty`, `seed`, `stop`, `streaming`, `timeout` (seconds), `max_retries`.
   * `template`: `template` (Liquid), over `query`, `variables`, `chat_history`, `outputs` and `errors`
   */
  @ApiProperty({ type: 'object', additionalProperties: true, example: { model: 'offline/echo' } })
  config: Record<string, unknown>;
}

/** When a conditional connection is taken. */
export class ConditionsDto {
  /** A CEL expression over `query`, `output` (of the source) and `variables` */
  @ApiProperty({ example: 'output.contains("invoice")' })
  expression: string;
}

/** The way from one agent to the next. */
export class ConnectionDto {
  source_agent_id: string;
  target_agent_id: string;

  /** `error` is taken when the source failed */
  @ApiProperty({ enum: ['default', 'conditional', 'error'], default: 'default', required: false })
  connection_type?: 'default' | 'conditional' | 'error';

  conditions?: ConditionsDto;

  /** Lower ones are looked at first */
  @ApiProperty({ type: 'integer', default: 0, required: false })
  priority?: number;
}

/** A graph without cycles. Agents without incoming connections begin, those without outgoing ones answer the client. */
export class WorkflowConfigurationDto {
  @ApiProperty({ type: [AgentDto] })
  agents: AgentDto[];

  @ApiProperty({ type: [ConnectionDto], required: false })
  connections?: ConnectionDto[];

  /** Anything; kept as it is */
  @ApiProperty({ type: 'object', additionalProperties: true, selfRequired: false })
  metadata?: Record<string, unknown>;
}

/** A new workflow. */
export class CreateWorkflowDto {
  /** What it is called; white space around it is dropped */
  @Transform(({ value }: { value: unknown }) => (typeof value === 'string' ? value.trim() : value))
  @IsString()
  @Length(1, 200)
  @IsStorableText()
  @ApiProperty({ example: supportDesk.name, minLength: 1, maxLength: 200 })
  name: string;

  /** Unique for its name. By default one more than the highest whole number that is a version of this name */
  @IsOptional()
  @Matches(/^[A-Za-z0-9][A-Za-z0-9._+-]{0,49}$/, {
    message:
      'version must be 1 to 50 letters, digits, dots, underscores, plus or minus signs, and begin with a letter or digit',
  })
  @ApiProperty({ type: String, required: false, pattern: '^[A-Za-z0-9][A-Za-z0-9._+-]{0,49}$' })
  version?: string | null;

  /** What it is for; null takes it away */
  @IsOptional()
  @IsString()
  @MaxLength(2000)
  @IsStorableText()
  @ApiProperty({ type: String, required: false, maxLength: 2000 })
  description?: string | null;

  /** The graph of its agents */
  @AsGiven()
  @ApiProperty({ type: WorkflowConfigurationDto, example: supportDesk.configuration })
  configuration: WorkflowConfiguration;

  /** Only an active workflow can be deployed */
  @IsOptional()
  @IsBoolean()
  @ApiProperty({ type: Boolean, required: false, default: true })
  is_active?: boolean | null;
}

/** What of a workflow shall change; what is left out (or null) stays. */
export class UpdateWorkflowDto extends PartialType(CreateWorkflowDto) {}

/** A named, versioned definition of a graph of agents. */
export class WorkflowDto {
  @ApiProperty({ format: 'uuid', example: supportDeskId })
  workflow_id: string;

  @ApiProperty({ example: supportDesk.name })
  name: string;

  @ApiProperty({ example: '1' })
  version: string;

  @ApiProperty({ type: String, required: false, example: supportDesk.description })
  description?: string;

  @ApiProperty({ type: WorkflowConfigurationDto, example: supportDesk.configuration })
  configuration: WorkflowConfiguration;

  is_active: boolean;

  /** Whether it has an active deployment, be it of an earlier configuration */
  is_deployed: boolean;

  created_at: Date;

  updated_at: Date;
}

/** Which workflows to list. */
export class ListWorkflowsDto {
  /** How many to leave out at the beginning */
  @QueryInteger()
  @IsInt()
  @Min(0)
  @Max(MAX_OFFSET)
  @ApiProperty({ type: 'integer', required: false, default: 0, minimum: 0, maximum: MAX_OFFSET })
  skip: number = 0;

  /** How many to answer with at most */
  @QueryInteger()
  @IsInt()
  @Min(1)
  @Max(1000)
  @ApiProperty({ type: 'integer', required: false, default: 100, minimum: 1, maximum: 1000 })
  limit: number = 100;

  /** Only those that are active, or only those that are not */
  @IsOptional()
  @QueryBoolean()
  @IsBoolean()
  @ApiProperty({ type: Boolean, required: false })
  is_active?: boolean;

  /** Only those that have an active deployment, or only those that have none */
  @IsOptional()
  @QueryBoolean()
  @IsBoolean()
  @ApiProperty({ type: Boolean, required: false })
  is_deployed?: boolean;

  /** Only those whose name contains this text, in upper or lower case */
  @IsOptional()
  @IsString()
  @MaxLength(200)
  @IsStorableText()
  @ApiProperty({ type: String, required: false, maxLength: 200 })
  name?: string;
}

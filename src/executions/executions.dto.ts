import { ApiProperty, ApiPropertyOptional } from '@nestjs/swagger';
import {
  ArrayMaxSize,
  IsArray,
  IsIn,
  IsInt,
  IsOptional,
  IsString,
  IsUUID,
  Max,
  MaxLength,
  Min,
} from 'class-validator';
import { AsGiven, IsMoment, IsStorableText, ListOf, QueryInteger } from '../dto.js';
import type { Execution } from '../database/entities/execution.entity.js';
import type { Presence } from './subscribers.js';
import type { Step } from '../database/entities/step.entity.js';
import { EXECUTION_STATUSES } from './status.js';
import type { ExecutionStatus } from './status.js';

/** Earlier messages of a conversation at most. */
const MOST_MESSAGES = 1000;
/** There is one thing to include; clients that build the list from several places may repeat it. */
const MOST_INCLUDED = 10;

/** One earlier message of the conversation. */
export class ChatMessageDto {
  @IsIn(['user', 'assistant', 'system'])
  actor: 'user' | 'assistant' | 'system';

  @IsString()
  content: string;
}

/** What to run, and with which input. */
export class ExecuteDto {
  /**
   * The name of an active deployment
   * @example support-desk
   */
  @IsString()
  @MaxLength(200)
  @IsStorableText()
  deployment_name: string;

  /**
   * Where several environments have this name: which one. Without it `production` comes first
   * @example production
   */
  @IsOptional()
  @IsString()
  @MaxLength(200)
  @IsStorableText()
  environment?: string;

  /**
   * The user's input
   * @example "My last invoice is wrong. What can I do?"
   */
  @IsString()
  query: string;

  /** The conversation so far, oldest message first */
  @IsOptional()
  @ListOf(() => ChatMessageDto, MOST_MESSAGES)
  @ApiProperty({
    type: [ChatMessageDto],
    maxItems: MOST_MESSAGES,
    required: false,
    example: [{ actor: 'user', content: 'Hello' }],
  })
  chat_history?: ChatMessageDto[];

  /**
   * `model`, `temperature`, `max_tokens`, `top_p`, `stop`, `timeout` (seconds) and `variables` for this run, and the same for
   * one agent under `agents.{agent_id}`; the deployment may allow fewer
   */
  @IsOptional()
  @AsGiven()
  @ApiPropertyOptional({ type: 'object', additionalProperties: true, example: { temperature: 0.2 } })
  runtime_overrides?: Record<string, unknown>;

  /**
   * When no client follows the execution any more: `continue` lets it finish, `cancel` cancels it after the deployment's
   * `disconnect_grace_ms`
   */
  @IsOptional()
  @IsIn(['continue', 'cancel'])
  @ApiPropertyOptional({ default: 'continue' })
  on_disconnect?: 'continue' | 'cancel';

  /** `progress` adds chunks of that type: each step's state and the text of the agents in between */
  @IsOptional()
  @IsArray()
  @ArrayMaxSize(MOST_INCLUDED)
  @IsIn(['progress'], { each: true })
  @ApiProperty({
    type: 'array',
    items: { type: 'string', enum: ['progress'] },
    maxItems: MOST_INCLUDED,
    required: false,
    example: [],
  })
  include?: 'progress'[];
}

/** Tokens as the providers counted them. */
export class UsageDto {
  input_tokens: number;
  output_tokens: number;
}

/** The answer of a finished execution. */
export class ExecuteResponseDto {
  /** @example success */
  status: 'success';
  response: string;
  execution_id: string;
  deployment_name: string;
  workflow_id: string;
  deployment_id: string;
  usage: UsageDto;
  /** From acceptance to the end, in ms. */
  duration_ms: number;
  timestamp: Date;
}

/** Where an accepted execution can be watched and stopped. */
export class ExecutionLinksDto {
  self: string;
  stream: string;
  progress: string;
  steps: string;
  cancel: string;
}

/** What is known of an execution at the moment of its acceptance. */
export type AcceptedExecution = Pick<
  Execution,
  'execution_id' | 'status' | 'deployment_name' | 'workflow_id' | 'deployment_id' | 'created_at'
>;

/** An accepted execution. */
export class ExecutionAcceptedDto {
  execution_id: string;
  /** `queued`; what it is now, if the same request had been accepted before. */
  @ApiProperty({ enum: EXECUTION_STATUSES })
  status: ExecutionStatus;
  deployment_name: string;
  workflow_id: string;
  deployment_id: string;
  created_at: Date;
  links: ExecutionLinksDto;

  /** Reads an execution at its acceptance as clients see it. */
  static from(accepted: AcceptedExecution): ExecutionAcceptedDto {
    const { execution_id, status, deployment_name, workflow_id, deployment_id, created_at } = accepted;
    const links = executionLinks(execution_id);
    return { execution_id, status, deployment_name, workflow_id, deployment_id, created_at, links };
  }
}

/** Why something failed. `code` is one of docs/errors.md. */
export class FailureDto {
  code: string;
  message: string;
}

/** One run of a deployment. */
export class ExecutionDto {
  execution_id: string;
  deployment_id: string;
  deployment_name: string;
  environment: string;
  workflow_id: string;
  /** The batch that it is an item of, and the name of the item there. */
  batch_id?: string;
  item_id?: string;
  @ApiProperty({ enum: EXECUTION_STATUSES })
  status: ExecutionStatus;
  /** What the answering agents said; after a failure or a cancellation the text so far. */
  response?: string;
  error?: FailureDto;
  usage: UsageDto;
  /** How often a worker took it up. */
  attempts: number;
  created_at: Date;
  started_at?: Date;
  first_chunk_at?: Date;
  finished_at?: Date;
  cancel_requested_at?: Date;
  /** Clients that follow its stream or wait for its end. */
  subscribers: number;
  /** When the last subscriber left before the end; absent while there is one, and if there never was one. */
  disconnected_at?: Date;
  /** From acceptance to the end, in ms. */
  duration_ms?: number;
  /** From acceptance to the first content chunk, in ms. */
  time_to_first_chunk_ms?: number;
  links: ExecutionLinksDto;

  /** Reads an execution's row as clients see it; fields without a value are left out. */
  static from(row: Execution, presence?: Presence): ExecutionDto {
    const since = (at: Date | null) => (at ? at.getTime() - row.created_at.getTime() : undefined);
    return {
      execution_id: row.execution_id,
      deployment_id: row.deployment_id,
      deployment_name: row.deployment_name,
      environment: row.environment,
      workflow_id: row.workflow_id,
      batch_id: row.batch_id ?? undefined,
      item_id: row.item_id ?? undefined,
      status: row.status,
      response: row.response ?? undefined,
      error: row.code ? { code: row.code, message: row.error ?? '' } : undefined,
      usage: { input_tokens: row.input_tokens, output_tokens: row.output_tokens },
      attempts: row.attempt,
      created_at: row.created_at,
      started_at: row.started_at ?? undefined,
      first_chunk_at: row.first_chunk_at ?? undefined,
      finished_at: row.finished_at ?? undefined,
      cancel_requested_at: row.cancel_requested_at ?? undefined,
      subscribers: presence?.subscribers ?? 0,
      disconnected_at: presence?.disconnected_at ?? undefined,
      duration_ms: since(row.finished_at),
      time_to_first_chunk_ms: since(row.first_chunk_at),
      links: executionLinks(row.execution_id),
    };
  }
}

/** A page of executions, newest first. */
export class ExecutionPageDto {
  items: ExecutionDto[];
  /** Pass it as `cursor` to read on; absent on the last page. */
  next_cursor?: string;
}

/** One agent's run inside an execution. */
export class StepDto {
  step_id: string;
  agent_id: string;
  /** @example completed */
  status: string;
  /** The execution's attempt that ran it last. */
  attempt: number;
  output?: string;
  error?: FailureDto;
  usage: UsageDto;
  started_at?: Date;
  finished_at?: Date;
  duration_ms?: number;

  /** Reads a step's row as clients see it. */
  static from(row: Step): StepDto {
    const { started_at: start, finished_at: end } = row;
    return {
      step_id: row.step_id,
      agent_id: row.agent_id,
      status: row.status,
      attempt: row.attempt,
      output: row.output ?? undefined,
      error: row.code ? { code: row.code, message: row.error ?? '' } : undefined,
      usage: { input_tokens: row.input_tokens, output_tokens: row.output_tokens },
      started_at: start ?? undefined,
      finished_at: end ?? undefined,
      duration_ms: start && end ? end.getTime() - start.getTime() : undefined,
    };
  }
}

/** The trace of an execution, in the order in which its steps began. */
export class StepListDto {
  items: StepDto[];
}

/** How far an execution is. */
export class ProgressDto {
  execution_id: string;
  @ApiProperty({ enum: EXECUTION_STATUSES })
  status: ExecutionStatus;
  /** Steps that have ended, skipped ones included. */
  completed_steps: number;
  total_steps: number;
  /** `completed_steps / total_steps`, from 0 to 1. */
  progress: number;
  /** The agents that run now. */
  running_agents: string[];
}

/** Which executions to list. */
export class ListExecutionsDto {
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

  /** Only the items of this batch */
  @IsOptional()
  @IsUUID()
  batch_id?: string;

  @IsOptional()
  @IsIn(EXECUTION_STATUSES)
  status?: ExecutionStatus;

  /** Accepted at or after this moment (ISO 8601) */
  @IsOptional()
  @IsMoment()
  from?: string;

  /** Accepted before this moment (ISO 8601) */
  @IsOptional()
  @IsMoment()
  to?: string;

  @IsOptional()
  @QueryInteger()
  @IsInt()
  @Min(1)
  @Max(1000)
  limit: number = 100;

  /** `next_cursor` of the page before */
  @IsOptional()
  @IsUUID()
  cursor?: string;
}

/** Where a stream shall begin, when the client can't send `Last-Event-ID`. */
export class StreamQueryDto {
  /** Sequence of the last chunk that the client has; 0 or nothing replays all of them */
  @IsOptional()
  @QueryInteger()
  @IsInt()
  @Min(0)
  @Max(2_147_483_647)
  after?: number;
}

/** The addresses of an execution, relative to the server. */
export function executionLinks(executionId: string): ExecutionLinksDto {
  const self = `/api/executions/${executionId}`;
  return {
    self,
    stream: `${self}/stream`,
    progress: `${self}/progress`,
    steps: `${self}/steps`,
    cancel: `${self}/cancel`,
  };
}

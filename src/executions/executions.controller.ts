import {
  Body,
  Controller,
  Get,
  Headers,
  HttpCode,
  Param,
  Post,
  Query,
  RequestMethod,
  Res,
  Sse,
} from '@nestjs/common';
import type { MessageEvent } from '@nestjs/common';
import { ApiHeader, ApiTags } from '@nestjs/swagger';
import type { Response } from 'express';
import type { Observable } from 'rxjs';
import { ApiProblems } from '../problem.dto.js';
import { ApiEventStream } from '../sse/api-event-stream.js';
import { ExecutionEventsQueryDto } from '../status-events/status-events.dto.js';
import { StatusStreams } from '../status-events/status.stream.js';
import { ExecutionStreams } from './execution.stream.js';
import {
  ExecuteDto,
  ExecuteResponseDto,
  ExecutionAcceptedDto,
  ExecutionDto,
  ExecutionPageDto,
  ListExecutionsDto,
  ProgressDto,
  StepListDto,
  StreamQueryDto,
} from './executions.dto.js';
import { ExecutionsReader } from './executions.reader.js';
import { ExecutionsService } from './executions.service.js';

const CHUNKS = 'Server-Sent Events; the data of each one is a chunk';

/** The header of a request to run something that can be repeated. */
export const IDEMPOTENCY_HEADER = {
  name: 'Idempotency-Key',
  required: false,
  description: 'The same key and body get the same execution or batch, which runs once',
} as const;

/** What can be wrong with a request to run something. */
export const REFUSALS = [
  'validation_failed',
  'idempotency_key_invalid',
  'idempotency_key_reused',
  'override_not_allowed',
  'deployment_not_found',
  'payload_too_large',
  'queue_full',
  'unavailable',
] as const;

@ApiTags('execute')
@Controller('api/workflows/execute')
export class ExecuteController {
  constructor(
    private readonly executions: ExecutionsService,
    private readonly streams: ExecutionStreams,
  ) {}

  /** Run a deployment and wait for its answer */
  @Post()
  @HttpCode(200)
  @ApiHeader(IDEMPOTENCY_HEADER)
  @ApiProblems(...REFUSALS, 'cancelled', 'model_error', 'agent_error', 'timeout')
  execute(
    @Body() request: ExecuteDto,
    @Headers('idempotency-key') idempotencyKey: string | undefined,
    @Res({ passthrough: true }) response: Response,
  ): Promise<ExecuteResponseDto> {
    return this.executions.execute(request, { idempotencyKey, response });
  }

  /** Run a deployment and stream its answer while it is generated (Server-Sent Events) */
  @Sse('stream', { method: RequestMethod.POST, maxPendingDataLength: 0 })
  @HttpCode(200)
  @ApiHeader(IDEMPOTENCY_HEADER)
  @ApiEventStream(CHUNKS)
  @ApiProblems(...REFUSALS, 'invalid_cursor', 'execution_not_found', 'log_expired')
  stream(
    @Body() request: ExecuteDto,
    @Headers('idempotency-key') idempotencyKey: string | undefined,
    @Headers('last-event-id') lastEventId: string | undefined,
    @Res({ passthrough: true }) response: Response,
  ): Promise<Observable<MessageEvent>> {
    return this.streams.start(request, { idempotencyKey, lastEventId, response });
  }

  /** Run a deployment in the background; the answer's links lead to its state and its stream */
  @Post('async')
  @HttpCode(202)
  @ApiHeader(IDEMPOTENCY_HEADER)
  @ApiProblems(...REFUSALS)
  executeAsync(
    @Body() request: ExecuteDto,
    @Headers('idempotency-key') idempotencyKey: string | undefined,
    @Res({ passthrough: true }) response: Response,
  ): Promise<ExecutionAcceptedDto> {
    return this.executions.executeAsync(request, { idempotencyKey, response });
  }
}

@ApiTags('executions')
@Controller('api/executions')
export class ExecutionsController {
  constructor(
    private readonly executions: ExecutionsService,
    private readonly reader: ExecutionsReader,
    private readonly streams: ExecutionStreams,
    private readonly statuses: StatusStreams,
  ) {}

  /**
   * List executions, newest first
   *
   * @remarks A page may be shorter than asked, or empty, where few executions pass the filter: `next_cursor` says whether there is more.
   */
  @Get()
  @ApiProblems('validation_failed', 'too_many_requests')
  list(@Query() filter: ListExecutionsDto): Promise<ExecutionPageDto> {
    return this.reader.list(filter);
  }

  /**
   * Watch the status of all executions, or of some (Server-Sent Events)
   *
   * @remarks A snapshot of the unfinished ones comes first, then every change of status once. It resumes without a gap, and never ends by itself: this page waits for an end, so read it with `curl -N` or an EventSource.
   */
  @Sse('events', { maxPendingDataLength: 0 })
  @ApiEventStream('Server-Sent Events; the data of each one is a snapshot or a change of status')
  @ApiProblems('validation_failed', 'invalid_cursor', 'too_many_requests')
  events(
    @Query() { after, ...filter }: ExecutionEventsQueryDto,
    @Headers('last-event-id') lastEventId: string | undefined,
    @Res({ passthrough: true }) response: Response,
  ): Promise<Observable<MessageEvent>> {
    return this.statuses.open(filter, { lastEventId, after, response });
  }

  /** Read an execution: its state, answer, usage and times */
  @Get(':execution_id')
  @ApiProblems('execution_not_found')
  get(@Param('execution_id') executionId: string): Promise<ExecutionDto> {
    return this.reader.get(executionId);
  }

  /** Read the full trace of an execution: what each agent did, when, and what it cost */
  @Get(':execution_id/steps')
  @ApiProblems('execution_not_found')
  steps(@Param('execution_id') executionId: string): Promise<StepListDto> {
    return this.reader.steps(executionId);
  }

  /** Read how far an execution is; light enough to be polled */
  @Get(':execution_id/progress')
  @ApiProblems('execution_not_found')
  progress(@Param('execution_id') executionId: string): Promise<ProgressDto> {
    return this.reader.progress(executionId);
  }

  /** Follow or replay a stream, from its beginning or from any chunk; 204 when nothing is left (Server-Sent Events) */
  @Sse(':execution_id/stream', { maxPendingDataLength: 0 })
  @ApiEventStream(CHUNKS)
  @ApiProblems('invalid_cursor', 'execution_not_found', 'log_expired')
  follow(
    @Param('execution_id') executionId: string,
    @Query() { after }: StreamQueryDto,
    @Headers('last-event-id') lastEventId: string | undefined,
    @Res({ passthrough: true }) response: Response,
  ): Promise<Observable<MessageEvent>> {
    return this.streams.follow(executionId, { after, lastEventId, response });
  }

  /** Cancel an execution; it ends as `cancelled` and keeps the text so far */
  @Post(':execution_id/cancel')
  @HttpCode(202)
  @ApiProblems('execution_not_found', 'execution_finished')
  cancel(@Param('execution_id') executionId: string): Promise<ExecutionDto> {
    return this.executions.cancel(executionId);
  }
}

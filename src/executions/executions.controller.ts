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
import { ApiHeader, ApiOkResponse, ApiProduces, ApiTags } from '@nestjs/swagger';
import type { Response } from 'express';
import type { Observable } from 'rxjs';
import { ApiProblems } from '../problem.dto.js';
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

const STREAM = {
  description: 'Server-Sent Events; the data of each one is a chunk',
  schema: { type: 'string' },
} as const;

@ApiTags('execute')
@Controller('api/workflows/execute')
export class ExecuteController {
  constructor(
    private readonly executions: ExecutionsService,
    private readonly streams: ExecutionStreams,
  ) {}

  /** Runs a deployment and waits for its answer */
  @Post()
  @HttpCode(200)
  @ApiProblems(400, 404, 409, 413, 500, 502, 503, 504)
  execute(
    @Body() request: ExecuteDto,
    @Res({ passthrough: true }) response: Response,
  ): Promise<ExecuteResponseDto> {
    return this.executions.execute(request, response);
  }

  /** Runs a deployment and streams its answer while it is generated (Server-Sent Events) */
  @Sse('stream', { method: RequestMethod.POST, maxPendingDataLength: 0 })
  @HttpCode(200)
  @ApiProduces('text/event-stream')
  @ApiOkResponse(STREAM)
  @ApiProblems(400, 404, 413, 503)
  stream(
    @Body() request: ExecuteDto,
    @Res({ passthrough: true }) response: Response,
  ): Promise<Observable<MessageEvent>> {
    return this.streams.start(request, response);
  }

  /** Runs a deployment in the background; the links of the answer lead to its state and its stream */
  @Post('async')
  @HttpCode(202)
  @ApiProblems(400, 404, 413, 503)
  executeAsync(
    @Body() request: ExecuteDto,
    @Res({ passthrough: true }) response: Response,
  ): Promise<ExecutionAcceptedDto> {
    return this.executions.executeAsync(request, response);
  }
}

@ApiTags('executions')
@Controller('api/executions')
export class ExecutionsController {
  constructor(
    private readonly executions: ExecutionsService,
    private readonly reader: ExecutionsReader,
    private readonly streams: ExecutionStreams,
  ) {}

  /** Executions, newest first */
  @Get()
  @ApiProblems(400)
  list(@Query() filter: ListExecutionsDto): Promise<ExecutionPageDto> {
    return this.reader.list(filter);
  }

  /** One execution: its state, answer, usage and times */
  @Get(':execution_id')
  @ApiProblems(404)
  get(@Param('execution_id') executionId: string): Promise<ExecutionDto> {
    return this.reader.get(executionId);
  }

  /** The full trace: what each agent did, when, and what it cost */
  @Get(':execution_id/steps')
  @ApiProblems(404)
  steps(@Param('execution_id') executionId: string): Promise<StepListDto> {
    return this.reader.steps(executionId);
  }

  /** How far it is, light enough to be polled */
  @Get(':execution_id/progress')
  @ApiProblems(404)
  progress(@Param('execution_id') executionId: string): Promise<ProgressDto> {
    return this.reader.progress(executionId);
  }

  /** Follows or replays a stream, from its beginning or from any chunk; 204 when nothing is left (Server-Sent Events) */
  @Sse(':execution_id/stream', { maxPendingDataLength: 0 })
  @ApiHeader({
    name: 'Last-Event-ID',
    required: false,
    description: 'The id of the last event that the client has',
  })
  @ApiProduces('text/event-stream')
  @ApiOkResponse(STREAM)
  @ApiProblems(400, 404, 410)
  follow(
    @Param('execution_id') executionId: string,
    @Query() { after }: StreamQueryDto,
    @Headers('last-event-id') lastEventId: string | undefined,
    @Res({ passthrough: true }) response: Response,
  ): Promise<Observable<MessageEvent>> {
    return this.streams.follow(executionId, { after, lastEventId, response });
  }

  /** Stops an execution; it ends as `cancelled` and keeps the text so far */
  @Post(':execution_id/cancel')
  @HttpCode(202)
  @ApiProblems(404, 409)
  cancel(@Param('execution_id') executionId: string): Promise<ExecutionDto> {
    return this.executions.cancel(executionId);
  }
}

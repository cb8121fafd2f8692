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
  StreamableFile,
} from '@nestjs/common';
import type { MessageEvent } from '@nestjs/common';
import { ApiHeader, ApiOkResponse, ApiProduces, ApiTags } from '@nestjs/swagger';
import { ServerResponse } from 'node:http';
import { Readable } from 'node:stream';
import type { Response } from 'express';
import type { Observable } from 'rxjs';
import { IDEMPOTENCY_HEADER, REFUSALS } from '../executions/executions.controller.js';
import { ApiProblems } from '../problem.dto.js';
import { ApiEventStream } from '../sse/api-event-stream.js';
import { BatchStreams, nameBatch } from './batch.stream.js';
import { BatchesAcceptance } from './batches.acceptance.js';
import {
  BatchAcceptedDto,
  BatchDto,
  BatchQueryDto,
  BatchStreamQueryDto,
  ExecuteBatchDto,
} from './batches.dto.js';
import { BatchesReader } from './batches.reader.js';
import { BatchesService } from './batches.service.js';

const CHUNKS =
  'Server-Sent Events; the data of each one is a chunk of an item, with its `item_id`, or of the batch itself';

@ApiTags('execute')
@Controller('api/workflows/execute/batch')
export class ExecuteBatchController {
  constructor(
    private readonly acceptance: BatchesAcceptance,
    private readonly streams: BatchStreams,
  ) {}

  /** Run a deployment for many queries in the background; all of them are accepted, or none */
  @Post()
  @HttpCode(202)
  @ApiHeader(IDEMPOTENCY_HEADER)
  @ApiProblems(...REFUSALS)
  async execute(
    @Body() request: ExecuteBatchDto,
    @Headers('idempotency-key') idempotencyKey: string | undefined,
    @Res({ passthrough: true }) response: Response,
  ): Promise<BatchAcceptedDto> {
    const accepted = await this.acceptance.accept(request, idempotencyKey);
    nameBatch(response, accepted.batch_id, 'self');
    return accepted;
  }

  /** Run a deployment for many queries and stream all answers as one, while they are generated (Server-Sent Events) */
  @Sse('stream', { method: RequestMethod.POST, maxPendingDataLength: 0 })
  @HttpCode(200)
  @ApiHeader(IDEMPOTENCY_HEADER)
  @ApiEventStream(CHUNKS)
  @ApiProblems(...REFUSALS, 'invalid_cursor', 'batch_not_found', 'log_expired')
  stream(
    @Body() request: ExecuteBatchDto,
    @Headers('idempotency-key') idempotencyKey: string | undefined,
    @Headers('last-event-id') lastEventId: string | undefined,
    @Res({ passthrough: true }) response: Response,
  ): Promise<Observable<MessageEvent>> {
    return this.streams.start(request, { idempotencyKey, lastEventId, response });
  }
}

@ApiTags('batches')
@Controller('api/batches')
export class BatchesController {
  constructor(
    private readonly batches: BatchesService,
    private readonly reader: BatchesReader,
    private readonly streams: BatchStreams,
  ) {}

  /** Read a batch: how far it is, and the states and results of its items */
  @Get(':batch_id')
  @ApiProblems('validation_failed', 'batch_not_found')
  get(@Param('batch_id') batchId: string, @Query() query: BatchQueryDto): Promise<BatchDto> {
    return this.reader.get(batchId, query);
  }

  /** Follow or replay the merged stream, from its beginning or from any event; 204 when nothing is left (Server-Sent Events) */
  @Sse(':batch_id/stream', { maxPendingDataLength: 0 })
  @ApiEventStream(CHUNKS)
  @ApiProblems('validation_failed', 'invalid_cursor', 'batch_not_found', 'log_expired')
  follow(
    @Param('batch_id') batchId: string,
    @Query() { after }: BatchStreamQueryDto,
    @Headers('last-event-id') lastEventId: string | undefined,
    @Res({ passthrough: true }) response: Response,
  ): Promise<Observable<MessageEvent>> {
    return this.streams.follow(batchId, { after, lastEventId, response });
  }

  /** Read the results of all items in their order, a line of JSON each (NDJSON); those of unfinished ones say only their state */
  @Get(':batch_id/results')
  @ApiProduces('application/x-ndjson')
  @ApiOkResponse({
    description: 'Newline-delimited JSON; each line is an item as in the batch',
    schema: { type: 'string' },
  })
  @ApiProblems('batch_not_found')
  async results(@Param('batch_id') batchId: string): Promise<StreamableFile> {
    const lines = await this.reader.results(batchId);
    return new StreamableFile(Readable.from(lines, { objectMode: false }), {
      type: 'application/x-ndjson; charset=utf-8',
    }).setErrorHandler((error, response) => {
      // An answer that ended in good order would pass for whole.
      if (response instanceof ServerResponse) response.destroy(error);
    });
  }

  /** Cancel a batch: its items that have not ended end as `cancelled`, and keep the text so far */
  @Post(':batch_id/cancel')
  @HttpCode(202)
  @ApiProblems('batch_not_found', 'batch_finished')
  cancel(@Param('batch_id') batchId: string): Promise<BatchDto> {
    return this.batches.cancel(batchId);
  }
}

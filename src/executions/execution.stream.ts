import { Inject, Injectable } from '@nestjs/common';
import type { MessageEvent } from '@nestjs/common';
import type { Response } from 'express';
import type { Observable } from 'rxjs';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { EventLog } from '../event-log/event-log.js';
import { Metrics } from '../metrics.js';
import { eventStream, noMoreEvents } from '../sse/event-stream.js';
import { chunkEvents } from './chunk-events.js';
import { ExecutionsAcceptance } from './executions.acceptance.js';
import type { ExecuteDto } from './executions.dto.js';
import { ExecutionsReader } from './executions.reader.js';
import { nameExecution } from './executions.service.js';
import { Subscribers } from './subscribers.js';

interface StreamRequest {
  execution_id: string;
  /** Sequence of the last chunk that the client has. */
  after: number;
  response: Response;
}

/** Reads an execution's log for one client: each chunk an event, at the client's own pace. */
@Injectable()
export class ExecutionStreams {
  constructor(
    private readonly log: EventLog,
    @Inject(CONFIG) private readonly config: ServerConfig,
    private readonly metrics: Metrics,
    private readonly acceptance: ExecutionsAcceptance,
    private readonly reader: ExecutionsReader,
    private readonly subscribers: Subscribers,
  ) {}

  /**
   * Accepts an execution and streams it from its first chunk. A request that was accepted before, as its idempotency key
   * or `lastEventId` tells, runs nothing: its execution is followed. Rejects as {@link ExecutionsAcceptance.accept} and
   * {@link ExecutionsReader.streamStart} do.
   */
  async start(
    request: ExecuteDto,
    {
      idempotencyKey,
      lastEventId,
      response,
    }: { idempotencyKey?: string; lastEventId?: string; response: Response },
  ): Promise<Observable<MessageEvent>> {
    if (lastEventId) {
      const executionId = await this.reader.findRepeated(request, lastEventId);
      nameExecution(response, executionId);
      return this.follow(executionId, { lastEventId, response });
    }
    const { execution_id, status } = await this.acceptance.accept(request, idempotencyKey);
    nameExecution(response, execution_id);
    if (status !== 'queued') return this.follow(execution_id, { response });
    return this.open({ execution_id, after: 0, response });
  }

  /** Streams an execution from where the client has it. Rejects as {@link ExecutionsReader.streamStart} does. */
  async follow(
    executionId: string,
    { response, ...from }: { after?: number; lastEventId?: string; response: Response },
  ): Promise<Observable<MessageEvent>> {
    const { after, ended } = await this.reader.streamStart(executionId, from);
    if (ended) return noMoreEvents(response);
    return this.open({ execution_id: executionId.toLowerCase(), after, response });
  }

  private open({ response, ...from }: StreamRequest): Observable<MessageEvent> {
    this.subscribers.followUntilOver(from.execution_id, response);
    const { execution_id: id, after } = from;
    const { STREAM_FLUSH_INTERVAL_MS: intervalMs, HEARTBEAT_INTERVAL_MS: idleMs } = this.config;
    return eventStream(response, {
      source: (signal) =>
        chunkEvents(this.log.read(id, after, { signal, idleMs }), { id, intervalMs, signal }),
      metrics: this.metrics,
    });
  }
}

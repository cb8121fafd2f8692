import { setTimeout as sleep } from 'node:timers/promises';
import { Inject, Injectable } from '@nestjs/common';
import type { MessageEvent } from '@nestjs/common';
import type { Response } from 'express';
import { EMPTY } from 'rxjs';
import type { Observable } from 'rxjs';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { EventLog } from '../event-log/event-log.js';
import type { LogBatch } from '../event-log/event-log.js';
import { Metrics } from '../metrics.js';
import { eventStream } from '../sse/event-stream.js';
import { ExecutionsAcceptance } from './executions.acceptance.js';
import type { ExecuteDto } from './executions.dto.js';
import { ExecutionsReader } from './executions.reader.js';
import { nameExecution } from './executions.service.js';
import { Subscribers } from './subscribers.js';

/**
 * Characters that are sent at once. The next piece follows an interval later, so that a client whose code takes each
 * read for whole lines, as many do, gets whole lines: reads are of 64 KiB.
 */
const MOST_CHARACTERS = 48 * 1024;

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
    if (!ended) return this.open({ execution_id: executionId.toLowerCase(), after, response });
    // Tells an EventSource not to come again (HTML standard, section 9.2.3).
    response.status(204).end();
    return EMPTY;
  }

  private open({ response, ...from }: StreamRequest): Observable<MessageEvent> {
    this.subscribers.followUntilOver(from.execution_id, response);
    return eventStream(response, { source: (signal) => this.chunks(from, signal), metrics: this.metrics });
  }

  /** The chunks as events, at most so many at once and so often as the pace allows; it ends after the terminal one. */
  private async *chunks(
    { execution_id, after }: Omit<StreamRequest, 'response'>,
    signal: AbortSignal,
  ): AsyncGenerator<MessageEvent[], void, void> {
    const { STREAM_FLUSH_INTERVAL_MS: interval, HEARTBEAT_INTERVAL_MS: idleMs } = this.config;
    let sentAt = -Infinity;
    for await (const batch of this.log.read(execution_id, after, { signal, idleMs })) {
      if (batch.chunks.length === 0) yield [{ comment: 'heartbeat' }];
      for (let sequence = batch.first; sequence <= batch.last;) {
        const early = sentAt + interval - performance.now();
        if (early >= 1) await pause(early, signal);
        if (signal.aborted) return;
        const events = eventsOf(batch, sequence, execution_id);
        sequence += events.length;
        // `started` alone does not begin the pace: the first text leaves at once too.
        if (sequence > 2) sentAt = performance.now();
        yield events;
      }
    }
  }
}

/** As much of a batch, from `sequence` on, as is sent at once. */
function eventsOf(batch: LogBatch, sequence: number, executionId: string): MessageEvent[] {
  const from = sequence - batch.first;
  let end = from;
  for (let characters = 0; end < batch.chunks.length && characters < MOST_CHARACTERS; end++) {
    characters += batch.chunks[end]?.length ?? 0;
  }
  return batch.chunks
    .slice(from, end)
    .map((data, index) => ({ id: `${executionId}:${sequence + index}`, data }));
}

async function pause(ms: number, signal: AbortSignal): Promise<void> {
  await sleep(ms, undefined, { signal }).catch(() => undefined); // only the abort rejects, and the caller looks at it
}

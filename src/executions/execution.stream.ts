import { setTimeout as sleep } from 'node:timers/promises';
import { Inject, Injectable, Logger } from '@nestjs/common';
import type { MessageEvent } from '@nestjs/common';
import type { Response } from 'express';
import { EMPTY, Observable } from 'rxjs';
import type { Subscriber } from 'rxjs';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { EventLog } from '../event-log/event-log.js';
import type { LogBatch } from '../event-log/event-log.js';
import { Metrics } from '../metrics.js';
import { ExecutionsAcceptance } from './executions.acceptance.js';
import type { ExecuteDto } from './executions.dto.js';
import { ExecutionsReader } from './executions.reader.js';
import { nameExecution } from './executions.service.js';
import { FrameOutput } from './frame-output.js';

/**
 * Characters that are sent at once. The next piece follows an interval later, so that a client whose code takes each
 * read for whole lines, as many do, gets whole lines: reads are of 64 KiB.
 */
const MOST_CHARACTERS = 48 * 1024;

/** How long a client shall wait before it reconnects (`retry:` of the HTML standard, section 9.2.6). */
const RECONNECT_MS = 1000;

interface StreamRequest {
  execution_id: string;
  /** Sequence of the last chunk that the client has. */
  after: number;
  response: Response;
}

/** Reads an execution's log for one client: each chunk an event, at the client's own pace. */
@Injectable()
export class ExecutionStreams {
  private readonly logger = new Logger(ExecutionStreams.name);

  constructor(
    private readonly log: EventLog,
    @Inject(CONFIG) private readonly config: ServerConfig,
    private readonly metrics: Metrics,
    private readonly acceptance: ExecutionsAcceptance,
    private readonly reader: ExecutionsReader,
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

  /** Completes after the terminal chunk; unsubscribing frees everything at once. */
  private open(request: StreamRequest): Observable<MessageEvent> {
    const output = new FrameOutput(request.response);
    return new Observable((subscriber) => {
      const gone = new AbortController();
      this.metrics.openStreams.inc();
      this.send(request, { output, subscriber, signal: gone.signal })
        .then(
          () => subscriber.complete(),
          (error: unknown) => {
            if (!request.response.headersSent) return subscriber.error(error);
            // Nest would say it in an event with an id of its own. A plain end makes the client come back instead.
            this.logger.error(error);
            subscriber.complete();
          },
        )
        .finally(() => this.metrics.openStreams.dec());
      return () => gone.abort();
    });
  }

  private async send(
    { execution_id, after }: StreamRequest,
    {
      output,
      subscriber,
      signal,
    }: { output: FrameOutput; subscriber: Subscriber<MessageEvent>; signal: AbortSignal },
  ): Promise<void> {
    const interval = this.config.STREAM_FLUSH_INTERVAL_MS;
    const client = { execution_id, output, subscriber };
    let retry: number | undefined = RECONNECT_MS;
    let sentAt = -Infinity;
    for await (const batch of this.log.read(execution_id, after, {
      signal,
      idleMs: this.config.HEARTBEAT_INTERVAL_MS,
    })) {
      if (batch.chunks.length === 0) subscriber.next({ comment: 'heartbeat' });
      for (let sequence = batch.first; sequence <= batch.last;) {
        const early = sentAt + interval - performance.now();
        if (early >= 1) await pause(early, signal);
        if (signal.aborted) return;
        sequence = emit(batch, { ...client, sequence, retry });
        retry = undefined;
        // `started` alone does not begin the pace: the first text leaves at once too.
        if (sequence > 2) sentAt = performance.now();
        await output.drained(signal);
      }
    }
  }
}

/** Sends some of a batch, from `sequence` on; returns the sequence to go on with. */
function emit(
  batch: LogBatch,
  to: {
    execution_id: string;
    sequence: number;
    retry: number | undefined;
    output: FrameOutput;
    subscriber: Subscriber<MessageEvent>;
  },
): number {
  const from = to.sequence - batch.first;
  let end = from;
  for (let characters = 0; end < batch.chunks.length && characters < MOST_CHARACTERS; end++) {
    characters += batch.chunks[end]?.length ?? 0;
  }
  to.output.gather(end - from);
  batch.chunks.slice(from, end).forEach((data, index) => {
    const retry = index === 0 ? to.retry : undefined;
    to.subscriber.next({ id: `${to.execution_id}:${to.sequence + index}`, retry, data });
  });
  return batch.first + end;
}

async function pause(ms: number, signal: AbortSignal): Promise<void> {
  await sleep(ms, undefined, { signal }).catch(() => undefined); // only the abort rejects, and the caller looks at it
}

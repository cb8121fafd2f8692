import { once } from 'node:events';
import type { OutgoingHttpHeaders } from 'node:http';
import { setImmediate as nextTurn, setTimeout as sleep } from 'node:timers/promises';
import { Inject, Injectable } from '@nestjs/common';
import type { MessageEvent } from '@nestjs/common';
import type { Response } from 'express';
import { EMPTY, Observable } from 'rxjs';
import type { Subscriber } from 'rxjs';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { EventLog } from '../event-log/event-log.js';
import type { LogBatch } from '../event-log/event-log.js';
import { Metrics } from '../metrics.js';
import type { ExecuteDto } from './executions.dto.js';
import { ExecutionsReader } from './executions.reader.js';
import { ExecutionsService } from './executions.service.js';

/**
 * In place of Nest's: without a charset some clients decode Latin-1 (`text/*` of old), and its `Cache-Control` says more
 * than the API promises.
 */
const HEADERS = {
  'Content-Type': 'text/event-stream; charset=utf-8',
  'Cache-Control': 'no-cache, no-transform',
};

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
  constructor(
    private readonly log: EventLog,
    @Inject(CONFIG) private readonly config: ServerConfig,
    private readonly metrics: Metrics,
    private readonly executions: ExecutionsService,
    private readonly reader: ExecutionsReader,
  ) {}

  /** Accepts an execution and streams it from its first chunk. Rejects as {@link ExecutionsService.accept} does. */
  async start(request: ExecuteDto, response: Response): Promise<Observable<MessageEvent>> {
    const { execution_id } = await this.executions.accept(request, response);
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
    useStreamFormat(request.response);
    return new Observable((subscriber) => {
      const gone = new AbortController();
      this.metrics.openStreams.inc();
      this.send(request, { subscriber, signal: gone.signal })
        .then(
          () => subscriber.complete(),
          (error: unknown) => subscriber.error(error),
        )
        .finally(() => this.metrics.openStreams.dec());
      return () => gone.abort();
    });
  }

  private async send(
    { execution_id, after, response }: StreamRequest,
    { subscriber, signal }: { subscriber: Subscriber<MessageEvent>; signal: AbortSignal },
  ): Promise<void> {
    const interval = this.config.STREAM_FLUSH_INTERVAL_MS;
    const client = { execution_id, subscriber, response };
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
        sequence = emit(batch, {
          ...client,
          sequence,
          retry: sentAt === -Infinity ? RECONNECT_MS : undefined,
        });
        sentAt = performance.now();
        await drained(response, signal);
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
    subscriber: Subscriber<MessageEvent>;
    response: Response;
  },
): number {
  let { sequence, retry } = to;
  // One system call, though every chunk is a frame of its own.
  to.response.cork();
  for (let characters = 0; sequence <= batch.last && characters < MOST_CHARACTERS; sequence++) {
    const data = batch.chunks[sequence - batch.first] ?? '';
    characters += data.length;
    to.subscriber.next({ id: `${to.execution_id}:${sequence}`, retry, data });
    retry = undefined;
  }
  setImmediate(() => to.response.uncork());
  return sequence;
}

/** Makes of Nest's answer what the API promises: its headers, and no empty line before the first frame. */
function useStreamFormat(response: Response): void {
  const writeHead = response.writeHead.bind(response) as (
    status: number,
    headers: OutgoingHttpHeaders,
  ) => Response;
  response.writeHead = ((status: number, headers: OutgoingHttpHeaders) =>
    writeHead(status, { ...headers, ...HEADERS })) as Response['writeHead'];
  const write = response.write.bind(response) as (text: string, ...rest: unknown[]) => boolean;
  response.write = ((text: string, ...rest: unknown[]) => {
    response.write = write as Response['write'];
    // Some clients take it for an event without data.
    return text === '\n' || write(text, ...rest);
  }) as Response['write'];
}

/**
 * Resolves once the client's socket has taken what was sent. `@Sse` can't pause a producer, it would queue for a slow
 * client without end; so the log is read on only when this resolves.
 */
async function drained(response: Response, signal: AbortSignal): Promise<void> {
  await nextTurn(); // Nest writes the events of a batch in microtasks
  while (response.writableNeedDrain && !signal.aborted) {
    await once(response, 'drain', { signal }).catch(() => undefined); // only the abort rejects, and it ends the loop
    await nextTurn();
  }
}

async function pause(ms: number, signal: AbortSignal): Promise<void> {
  await sleep(ms, undefined, { signal }).catch(() => undefined); // only the abort rejects, and the caller looks at it
}

import { Inject, Injectable } from '@nestjs/common';
import type { MessageEvent } from '@nestjs/common';
import type { Response } from 'express';
import type { Observable } from 'rxjs';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { MergedLog } from '../event-log/merged-log.js';
import { chunkEvents } from '../executions/chunk-events.js';
import { parseEventId } from '../executions/executions.reader.js';
import { Metrics } from '../metrics.js';
import { eventStream, noMoreEvents } from '../sse/event-stream.js';
import { BatchesAcceptance } from './batches.acceptance.js';
import { batchLinks } from './batches.dto.js';
import type { ExecuteBatchDto } from './batches.dto.js';
import { BatchesReader } from './batches.reader.js';

/** Reads a batch's merged log for one client: the chunks of all items, each an event, at the client's own pace. */
@Injectable()
export class BatchStreams {
  constructor(
    private readonly log: MergedLog,
    @Inject(CONFIG) private readonly config: ServerConfig,
    private readonly metrics: Metrics,
    private readonly acceptance: BatchesAcceptance,
    private readonly reader: BatchesReader,
  ) {}

  /**
   * Accepts a batch and streams it from its first chunk. A request that was accepted before, as its idempotency key or
   * `lastEventId` tells, runs nothing: its batch is followed. Rejects as {@link BatchesAcceptance.accept} and
   * {@link BatchesReader.streamStart} do.
   */
  async start(
    request: ExecuteBatchDto,
    {
      idempotencyKey,
      lastEventId,
      response,
    }: { idempotencyKey?: string; lastEventId?: string; response: Response },
  ): Promise<Observable<MessageEvent>> {
    const batchId = lastEventId
      ? await this.findRepeated(request, lastEventId)
      : (await this.acceptance.accept(request, idempotencyKey)).batch_id;
    nameBatch(response, batchId, 'stream');
    return this.follow(batchId, { lastEventId, response });
  }

  /** Streams a batch from where the client has it. Rejects as {@link BatchesReader.streamStart} does. */
  async follow(
    batchId: string,
    { response, ...from }: { after?: number; lastEventId?: string; response: Response },
  ): Promise<Observable<MessageEvent>> {
    const { after, ended } = await this.reader.streamStart(batchId, from);
    if (ended) return noMoreEvents(response);
    const id = batchId.toLowerCase();
    const idleMs = this.config.HEARTBEAT_INTERVAL_MS;
    return eventStream(response, {
      // The merged log keeps the pace itself while it grows; what is behind that is a lot, and need not wait.
      source: (signal) =>
        chunkEvents(this.log.read(id, after, { signal, idleMs }), { id, intervalMs: 0, signal }),
      metrics: this.metrics,
    });
  }

  private async findRepeated(request: ExecuteBatchDto, lastEventId: string): Promise<string> {
    const batch = await this.reader.find(parseEventId(lastEventId).id);
    this.acceptance.refuseOther(request, batch);
    return batch.batch_id;
  }
}

/** Names a batch in the headers of an answer. Nest ends the answer at once when its client leaves during the acceptance. */
export function nameBatch(response: Response, batchId: string, location: 'self' | 'stream'): void {
  if (response.headersSent) return;
  const links = batchLinks(batchId);
  response.setHeader('Content-Location', links.self);
  response.setHeader('Location', links[location]);
}

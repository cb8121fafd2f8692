import { Inject, Injectable } from '@nestjs/common';
import type { MessageEvent } from '@nestjs/common';
import type { Response } from 'express';
import type { Observable } from 'rxjs';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { AppError } from '../errors.js';
import { Metrics } from '../metrics.js';
import { eventStream } from '../sse/event-stream.js';
import type { StatusChange, StatusFilter, StatusSnapshot } from './status-event.js';
import { StatusEvents } from './status-events.js';

/** Sends changes of status to clients, each an event whose id is its sequence. */
@Injectable()
export class StatusStreams {
  constructor(
    private readonly events: StatusEvents,
    @Inject(CONFIG) private readonly config: ServerConfig,
    private readonly metrics: Metrics,
  ) {}

  /**
   * A snapshot, then every change once; for a client that comes back only the changes that it has not had, unless they are
   * too old to be kept. `lastEventId` wins over `after`. It never ends by itself. Rejects with `invalid_cursor`.
   */
  async open(
    filter: StatusFilter,
    { lastEventId, after, response }: { lastEventId?: string; after?: number; response: Response },
  ): Promise<Observable<MessageEvent>> {
    const start = await this.events.begin(filter, lastEventId ? parseEventId(lastEventId) : after);
    const from =
      typeof start === 'number'
        ? { cursor: start, first: [] }
        : { cursor: start.sequence, first: [messageOf(start)] };
    return eventStream(response, {
      source: (signal) => this.messages(filter, from, signal),
      metrics: this.metrics,
    });
  }

  private async *messages(
    filter: StatusFilter,
    { cursor, first }: { cursor: number; first: MessageEvent[] },
    signal: AbortSignal,
  ): AsyncGenerator<MessageEvent[], void, void> {
    // A snapshot can be large, and the stream lasts: it is not kept.
    if (first.length > 0) yield first.splice(0);
    const idleMs = this.config.HEARTBEAT_INTERVAL_MS;
    for await (const changes of this.events.read(filter, cursor, { signal, idleMs })) {
      yield changes.length === 0 ? [{ comment: 'heartbeat' }] : changes.map(messageOf);
    }
  }
}

function messageOf(event: StatusChange | StatusSnapshot): MessageEvent {
  return { id: String(event.sequence), data: JSON.stringify(event) };
}

function parseEventId(eventId: string): number {
  if (/^\d{1,15}$/.test(eventId)) return Number(eventId);
  throw new AppError('invalid_cursor', 'Last-Event-ID must be the id of an event of this stream: a number.');
}

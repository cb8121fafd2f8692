import { Logger } from '@nestjs/common';
import type { MessageEvent } from '@nestjs/common';
import type { Response } from 'express';
import { EMPTY, Observable } from 'rxjs';
import type { Subscriber } from 'rxjs';
import type { Metrics } from '../metrics.js';
import { FrameOutput } from './frame-output.js';

/** How long a client shall wait before it reconnects (`retry:` of the HTML standard, section 9.2.6). */
const RECONNECT_MS = 1000;

/**
 * Makes the events that reach a client until `signal` aborts. It is asked for the next ones only after the client's socket
 * took those before, so that a slow client holds one array of events at most.
 */
export type EventSource = (signal: AbortSignal) => AsyncIterable<MessageEvent[]>;

/**
 * What an `@Sse` route returns to send the events of `source` at the client's own pace. Completes when `source` does;
 * unsubscribing, which Nest does when the client has gone, aborts its signal.
 */
export function eventStream(
  response: Response,
  { source, metrics }: { source: EventSource; metrics: Metrics },
): Observable<MessageEvent> {
  const output = new FrameOutput(response);
  return new Observable((subscriber) => {
    const gone = new AbortController();
    metrics.openStreams.inc();
    send(source(gone.signal), { output, subscriber, signal: gone.signal })
      .then(
        () => subscriber.complete(),
        (error: unknown) => {
          if (!response.headersSent) return subscriber.error(error);
          // Nest would say it in an event with an id of its own. A plain end makes the client come back instead.
          new Logger('EventStream').error(error);
          subscriber.complete();
        },
      )
      .finally(() => metrics.openStreams.dec());
    return () => gone.abort();
  });
}

/** Answers a client that has all of a stream: 204 tells an EventSource not to come again (HTML standard, section 9.2.3). */
export function noMoreEvents(response: Response): Observable<MessageEvent> {
  response.status(204).end();
  return EMPTY;
}

async function send(
  source: AsyncIterable<MessageEvent[]>,
  to: { output: FrameOutput; subscriber: Subscriber<MessageEvent>; signal: AbortSignal },
): Promise<void> {
  let retry: number | undefined = RECONNECT_MS;
  for await (const events of source) {
    to.output.gather(events.length);
    for (const event of events) {
      to.subscriber.next(retry === undefined || event.comment !== undefined ? event : { ...event, retry });
      if (event.comment === undefined) retry = undefined;
    }
    await to.output.drained(to.signal);
  }
}

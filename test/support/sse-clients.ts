import type { fetchEventSource } from '@microsoft/fetch-event-source';
import type { Chunk } from '../../src/event-log/chunk.js';
import type { Frame } from './studio.js';

/** What the EventSources have in common. */
interface AnyEventSource {
  readonly readyState: number;
  addEventListener(type: string, listener: (event: { data: string; lastEventId: string }) => void): void;
  close(): void;
}

export type EventSourceClass = new (url: string) => AnyEventSource;

/** What a client is to run, and whether it ends by itself at the terminal chunk, as it should. */
export interface Run {
  server: string;
  request: { deployment_name: string; query: string };
  stops: boolean;
}

// The next two functions run in a page, too, where they are all of this file that there is: they use nothing outside of
// themselves but what a browser has.

/** Starts an execution and follows it until the terminal chunk, or until the source gives up if it is not stopped there. */
export async function runWithEventSource(
  EventSource: EventSourceClass,
  { server, request, stops }: Run,
): Promise<Frame[]> {
  const accepted = await fetch(`${server}/api/workflows/execute/async`, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify(request),
  });
  const { links } = (await accepted.json()) as { links: { stream: string } };
  const source = new EventSource(server + links.stream);
  const frames: Frame[] = [];
  await new Promise<void>((resolve) => {
    source.addEventListener('message', ({ data, lastEventId }) => {
      const chunk = JSON.parse(data) as Chunk;
      frames.push({ id: lastEventId, data, chunk });
      if (!stops || !['completed', 'error', 'cancelled'].includes(chunk.status ?? '')) return;
      source.close();
      resolve();
    });
    const closed = 2;
    source.addEventListener('error', () => {
      if (source.readyState === closed) resolve();
    });
  });
  return frames;
}

/** Runs a POST that the library repeats until the terminal chunk, or until 204 if it is not stopped there. */
export async function runWithFetchEventSource(
  fetchEvents: typeof fetchEventSource,
  { server, request, stops, headers, counts = false, delivered }: Run & FetchEventSourceOptions,
): Promise<Frame[]> {
  const frames: Frame[] = [];
  const stopped = new AbortController();
  class Finished extends Error {}
  class Refused extends Error {}
  const fetchAfterDelivered: typeof fetch = (input, init) => {
    const last = frames.at(-1);
    const headers = new Headers(init?.headers);
    if (last) headers.set('last-event-id', last.id);
    return fetch(input, { ...init, headers });
  };
  await fetchEvents(`${server}/api/workflows/execute/stream`, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json', ...headers },
    body: JSON.stringify(request),
    signal: stopped.signal,
    fetch: counts ? fetchAfterDelivered : undefined,
    onopen: async (answer) => {
      if (answer.status === 200) return;
      throw answer.status === 204 ? new Finished() : new Refused(await answer.text());
    },
    onmessage: ({ id, data }) => {
      if (data === '') return; // a heartbeat
      const chunk = JSON.parse(data) as Chunk;
      frames.push({ id, data, chunk });
      delivered?.(frames.length);
      if (stops && ['completed', 'error', 'cancelled'].includes(chunk.status ?? '')) stopped.abort();
    },
    onclose: () => {
      throw new Error('The connection was closed before the terminal chunk');
    },
    onerror: (error: unknown) => {
      if (error instanceof Finished || error instanceof Refused) throw error; // anything else: it tries again
    },
  }).catch((error: unknown) => {
    if (!(error instanceof Finished)) throw error;
  });
  return frames;
}

interface FetchEventSourceOptions {
  /** Go with each request. */
  headers?: Record<string, string>;
  /** A repeated request names the last event that was delivered, where the library names the last `id` line that came. */
  counts?: boolean;
  delivered?: (count: number) => void;
}

/** What fetch-event-source takes from a browser, for Node.js. The page can be hidden and shown. */
export class BrowserGlobals {
  private readonly document = Object.assign(new EventTarget(), { hidden: false });

  constructor() {
    Object.assign(globalThis, { document: this.document, window: { setTimeout, clearTimeout, fetch } });
  }

  setHidden(hidden: boolean): void {
    this.document.hidden = hidden;
    this.document.dispatchEvent(new Event('visibilitychange'));
  }

  remove(): void {
    Reflect.deleteProperty(globalThis, 'document');
    Reflect.deleteProperty(globalThis, 'window');
  }
}

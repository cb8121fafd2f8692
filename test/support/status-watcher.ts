import { randomInt } from 'node:crypto';
import { expect } from '@jest/globals';
import { createParser } from 'eventsource-parser';
import type { StatusChange, StatusSnapshot } from '../../src/status-events/status-event.js';

type StatusMessage = StatusChange | StatusSnapshot;

/** A client that watches, from the moment that its first message is there. */
export class StatusWatcher {
  readonly messages: StatusMessage[] = [];
  ids: string[] = [];
  raw = '';
  ended = false;
  private readonly leaving = new AbortController();

  constructor(
    private readonly path: string,
    private readonly urls: string[],
  ) {}

  static async open(path: string, urls: string[], lastEventId?: string): Promise<StatusWatcher> {
    const watcher = new StatusWatcher(path, urls);
    await watcher.connect(lastEventId);
    return watcher;
  }

  /** Reads until it is left, at any of its addresses. */
  async connect(lastEventId?: string): Promise<void> {
    const url = this.urls[randomInt(this.urls.length)] ?? '';
    const headers = lastEventId === undefined ? undefined : { 'Last-Event-ID': lastEventId };
    const response = await fetch(url + this.path, { headers, signal: this.leaving.signal });
    expect(response.status).toBe(200);
    expect(response.headers.get('content-type')).toBe('text/event-stream; charset=utf-8');
    void this.read(response).catch((error: unknown) => {
      if (!this.leaving.signal.aborted) throw error;
    });
  }

  /** Reads some messages, then breaks the connection off and comes back, again and again until `done`. */
  async readInPieces(done: () => boolean): Promise<void> {
    while (!done()) {
      const id = this.ids.at(-1);
      const headers = id === undefined ? undefined : { 'Last-Event-ID': id };
      const leaving = new AbortController();
      const url = this.urls[randomInt(this.urls.length)] ?? '';
      const most = this.messages.length + randomInt(1, 12);
      // Its piece may never come, since the stream has no end of its own.
      const timer = setInterval(() => done() && leaving.abort(), 20);
      try {
        const response = await fetch(url + this.path, { headers, signal: leaving.signal });
        await this.read(response, () => this.messages.length >= most);
      } catch (error) {
        if (!leaving.signal.aborted) throw error;
      } finally {
        clearInterval(timer);
        leaving.abort();
      }
    }
  }

  changes(): StatusChange[] {
    return this.messages.filter((message) => message.type !== 'snapshot');
  }

  leave(): void {
    this.leaving.abort();
  }

  private async read(response: Response, enough: () => boolean = () => false): Promise<void> {
    const parser = createParser({
      onEvent: ({ id = '', data }) => {
        if (enough()) return;
        const message = JSON.parse(data) as StatusMessage;
        expect(id).toBe(String(message.sequence));
        this.messages.push(message);
        this.ids.push(id);
      },
    });
    const decoder = new TextDecoder();
    for await (const bytes of response.body ?? []) {
      const text = decoder.decode(bytes as Uint8Array, { stream: true });
      this.raw += text;
      parser.feed(text);
      if (enough()) return;
    }
    this.ended = true;
  }
}

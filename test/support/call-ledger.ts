import { EventEmitter } from 'node:events';
import type { ServerResponse } from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { Upstream, chatDelta, chatEnd, writeStream } from './upstream.js';
import type { UpstreamRequest } from './upstream.js';

/** One call of a model, as the model saw it. */
export interface ModelCall {
  /** Of the execution, from its query. */
  marker: string;
  /** Which agent called. */
  agent: string;
  /** By the clock on the wall, as the database's times are. */
  begunAt: number;
  endedAt: number | undefined;
  /** The caller's end of the connection: it tells which process that is. */
  port: number;
  /** `true` if the caller closed the connection before the answer's end. */
  closed: Promise<boolean>;
  /** Which call of its execution and agent this is, from 1. */
  ordinal: number;
  /** Resolves when the model has said its last word, or nobody listens any more. */
  spoken: Promise<void>;
}

/** Marks a query, so that all calls of its execution are found in the ledger. */
export const markerOf = (name: string) => `<<${name}>>`;
const MARKER = /<<[^<>]+>>/;
const MODEL = /^(?<agent>[^~]+)~(?<pieces>\d+)x(?<pauseMs>\d+)$/;

/** Each piece of an answer; with `ordinal` where it matters which call spoke. */
const piece = (marker: string, agent: string, index: number, ordinal?: number) =>
  `${marker}${ordinal === undefined ? '' : `#${ordinal}`} ${agent} ${index}, `;

/** What an agent of {@link CallLedger.agent} answers, whenever and however often it is asked. */
export function answerOf(marker: string, agent: string, pieces: number): string {
  return Array.from({ length: pieces }, (_, index) => piece(marker, agent, index)).join('');
}

/** A model provider in the test's own process that keeps account of every call, whatever becomes of the servers. */
export class CallLedger {
  readonly calls: ModelCall[] = [];
  /** Calls under way now, and the most that there were at once. */
  active = 0;
  peak = 0;
  private readonly changes = new EventEmitter().setMaxListeners(0);
  private readonly held = new Map<string, number | undefined>();
  private readonly released = new Set<string>();

  private readonly server = new Upstream((response, request) => this.answer(response, request));

  static async start(): Promise<CallLedger> {
    const ledger = new CallLedger();
    await ledger.listen();
    return ledger;
  }

  listen(): Promise<void> {
    return this.server.listen();
  }

  /** To be the `base_url` of a provider. */
  get url(): string {
    return this.server.url;
  }

  /** MODEL_PROVIDERS of the servers. */
  get providers(): string {
    return JSON.stringify({ upstream: { type: 'openai-compatible', base_url: this.server.url } });
  }

  get port(): number {
    return Number(new URL(this.server.url).port);
  }

  /** An agent whose model says so many pieces, one every `pauseMs`. Its name begins with `tagged` to number its calls in the text. */
  agent(agent_id: string, pieces = 15, pauseMs = 15) {
    const model = `upstream/${agent_id}~${pieces}x${pauseMs}`;
    return { agent_id, agent_type: 'llm', config: { model, max_retries: 0 } };
  }

  /** The calls of an execution, and of one of its agents. */
  of(marker: string, agent?: string): ModelCall[] {
    return this.calls.filter((call) => call.marker === marker && (!agent || call.agent === agent));
  }

  /** Lets the calls of an execution come to a halt in the middle, or before a piece, until they are let go. */
  hold(marker: string, beforePiece?: number): void {
    this.held.set(marker, beforePiece);
  }

  /** All calls of the execution, or only its n-th (from 1): that one says the rest, but its answer does not end. */
  letGo(marker: string, ordinal?: number): void {
    if (ordinal === undefined) this.held.delete(marker);
    else this.released.add(`${marker}${ordinal}`);
    this.changes.emit('change');
  }

  /** Resolves with the n-th call of an execution (from 1), as soon as it is there. */
  async call(marker: string, ordinal = 1): Promise<ModelCall> {
    for (;;) {
      const call = this.of(marker)[ordinal - 1];
      if (call) return call;
      await this.changed();
    }
  }

  /** Resolves at the next call, end of a call, or release. */
  changed(): Promise<void> {
    return new Promise((resolve) => this.changes.once('change', () => resolve()));
  }

  stop(): Promise<void> {
    return this.server.stop();
  }

  private async answer(response: ServerResponse, { body, closed }: UpstreamRequest): Promise<void> {
    const { agent = '', pieces = 0, pauseMs = 0 } = MODEL.exec(String(body.model))?.groups ?? {};
    const marker = MARKER.exec(JSON.stringify(body.messages))?.[0] ?? '';
    const ordinal = this.of(marker, agent).length + 1;
    const answer = { marker, agent, pieces: Number(pieces), pauseMs: Number(pauseMs), ordinal };
    const call: ModelCall = {
      marker,
      agent,
      ordinal,
      closed,
      begunAt: Date.now(),
      endedAt: undefined,
      port: response.socket?.remotePort ?? 0,
      spoken: this.speak(response, answer),
    };
    this.calls.push(call);
    this.peak = Math.max(this.peak, ++this.active);
    response.once('close', () => {
      this.active--;
      call.endedAt = Date.now();
      this.changes.emit('change');
    });
    this.changes.emit('change');
    await call.spoken;
    await this.untilLetGo(marker, response);
    response.end(chatEnd());
  }

  private async speak(response: ServerResponse, { marker, agent, ...answer }: Answer): Promise<void> {
    const { pieces, pauseMs, ordinal } = answer;
    const tag = agent.startsWith('tagged') ? ordinal : undefined;
    for (let index = 0; index < pieces; index++) {
      if (index === (this.held.get(marker) ?? Math.ceil(pieces / 2)))
        await this.untilLetGo(marker, response, ordinal);
      if (response.closed) return;
      writeStream(response, chatDelta(piece(marker, agent, index, tag)));
      await sleep(pauseMs);
    }
  }

  private async untilLetGo(marker: string, response: ServerResponse, ordinal?: number): Promise<void> {
    const isHeld = () => this.held.has(marker) && !this.released.has(`${marker}${ordinal}`);
    while (isHeld() && !response.closed) await this.changed();
  }
}

interface Answer {
  marker: string;
  agent: string;
  pieces: number;
  pauseMs: number;
  ordinal: number;
}

import { once } from 'node:events';
import { createServer } from 'node:http';
import type { IncomingHttpHeaders, IncomingMessage, Server, ServerResponse } from 'node:http';
import type { AddressInfo, Socket } from 'node:net';

/** A request that reached an {@link Upstream}. */
export interface UpstreamRequest {
  path: string;
  headers: IncomingHttpHeaders;
  body: Record<string, unknown>;
  /** The last message's text; "" where there is none. */
  query: string;
  /** Resolves when the response is over: `true` if the client closed the connection before its end. */
  closed: Promise<boolean>;
}

export type UpstreamAnswer = (response: ServerResponse, request: UpstreamRequest) => unknown;

/**
 * A model provider whose answers a test writes byte by byte, for what well-behaved servers don't do. `answer` gets the
 * bare response of each request; see {@link writeStream}, {@link chatDelta} and {@link chatEnd} for its usual pieces.
 */
export class Upstream {
  readonly requests: UpstreamRequest[] = [];
  /** How many connections were made. */
  connections = 0;
  private readonly open = new Set<Socket>();
  private readonly waiting: (() => void)[] = [];

  private readonly server: Server = createServer({ keepAliveTimeout: 60_000 });

  /** It is to {@link listen} before it is asked. */
  constructor(private readonly answer: UpstreamAnswer) {
    this.server.on('connection', (socket: Socket) => this.accept(socket));
    this.server.on('request', (request, response) => void this.handle(request, response));
  }

  static async start(answer: UpstreamAnswer): Promise<Upstream> {
    const upstream = new Upstream(answer);
    await upstream.listen();
    return upstream;
  }

  async listen(): Promise<void> {
    this.server.listen(0, '127.0.0.1');
    await once(this.server, 'listening');
  }

  /** To be the `base_url` of a provider. */
  get url(): string {
    const { port } = this.server.address() as AddressInfo;
    return `http://127.0.0.1:${port}/v1`;
  }

  /** Connections that are open now. */
  get openConnections(): number {
    return this.open.size;
  }

  /** The request with this index (the first is 0), as soon as it is there. */
  async request(index: number): Promise<UpstreamRequest> {
    for (;;) {
      const request = this.requests[index];
      if (request !== undefined) return request;
      await new Promise<void>((resolve) => this.waiting.push(resolve));
    }
  }

  async stop(): Promise<void> {
    if (!this.server.listening) return;
    this.server.closeAllConnections();
    this.server.close();
    await once(this.server, 'close');
  }

  private accept(socket: Socket): void {
    this.connections++;
    this.open.add(socket);
    socket.on('close', () => this.open.delete(socket));
  }

  private async handle(incoming: IncomingMessage, response: ServerResponse): Promise<void> {
    const pieces: Buffer[] = [];
    for await (const piece of incoming) pieces.push(piece);
    const body = JSON.parse(Buffer.concat(pieces).toString()) as Record<string, unknown>;
    const messages = (body.messages ?? []) as { content?: unknown }[];
    const query = messages.at(-1)?.content;
    const request: UpstreamRequest = {
      path: incoming.url ?? '',
      headers: incoming.headers,
      body,
      query: typeof query === 'string' ? query : '',
      closed: once(response, 'close').then(() => !response.writableFinished),
    };
    this.requests.push(request);
    for (const wake of this.waiting.splice(0)) wake();
    this.answer(response, request);
  }
}

/** Starts an event stream with these pieces; it stays open. */
export function writeStream(response: ServerResponse, ...pieces: (string | Buffer)[]): void {
  if (!response.headersSent) response.writeHead(200, { 'content-type': 'text/event-stream' });
  for (const piece of pieces) response.write(piece);
}

/** One event of an OpenAI-compatible stream that carries a piece of text. */
export function chatDelta(content: string): string {
  return chatEvent({ choices: [{ index: 0, delta: { content } }] });
}

/** The end of an OpenAI-compatible stream: why the model stopped, the usage, and the closing mark. */
export function chatEnd(usage = { prompt_tokens: 3, completion_tokens: 5, total_tokens: 8 }): string {
  return `${chatEvent({ choices: [{ index: 0, delta: {}, finish_reason: 'stop' }] })}${chatEvent({ choices: [], usage })}data: [DONE]\n\n`;
}

/** An event of an OpenAI-compatible stream with these fields. */
export function chatEvent(fields: object): string {
  return `data: ${JSON.stringify({ id: 'c1', object: 'chat.completion.chunk', created: 1, model: 'm', ...fields })}\n\n`;
}

/** An event of Anthropic's stream. */
export function messageEvent(type: string, fields: object): string {
  return `event: ${type}\ndata: ${JSON.stringify({ type, ...fields })}\n\n`;
}

/** A whole answer in the form of Anthropic's stream. */
export function messageStream(
  words: string[],
  usage: { input_tokens: number; output_tokens: number },
): string {
  const message = {
    id: 'm1',
    type: 'message',
    role: 'assistant',
    model: 'm',
    content: [],
    stop_reason: null,
  };
  return [
    messageEvent('message_start', { message: { ...message, usage: { ...usage, output_tokens: 1 } } }),
    messageEvent('content_block_start', { index: 0, content_block: { type: 'text', text: '' } }),
    ...words.map((text) =>
      messageEvent('content_block_delta', { index: 0, delta: { type: 'text_delta', text } }),
    ),
    messageEvent('content_block_stop', { index: 0 }),
    messageEvent('message_delta', {
      delta: { stop_reason: 'end_turn', stop_sequence: null },
      usage: { output_tokens: usage.output_tokens },
    }),
    messageEvent('message_stop', {}),
  ].join('');
}

import { createParser } from 'eventsource-parser';
import type { Chunk } from '../../src/event-log/chunk.js';

/** One event as it came over the wire. */
export interface Frame {
  id: string;
  data: string;
  chunk: Chunk;
}

let deployments = 0;

/** A client of a running server, for tests. */
export class Studio {
  /** @param address the server's URL, or what gives it once the server is there */
  constructor(private readonly address: string | (() => string)) {}

  get url(): string {
    return typeof this.address === 'string' ? this.address : this.address();
  }

  async json<Body>(
    path: string,
    init?: { method?: string; body?: unknown; headers?: Record<string, string> },
  ): Promise<{ status: number; body: Body; headers: Headers }> {
    const response = await this.fetch(path, init);
    const text = await response.text();
    return {
      status: response.status,
      body: (text === '' ? undefined : JSON.parse(text)) as Body,
      headers: response.headers,
    };
  }

  /** Creates and deploys a workflow of these agents and connections; answers with the deployment's name. */
  async deploy(
    configuration: { agents: object[]; connections?: object[] },
    runtime_config: object = {},
  ): Promise<string> {
    const name = `test-${++deployments}`;
    const workflow = await this.json<{ workflow_id: string }>('/api/workflows', {
      method: 'POST',
      body: { name, configuration },
    });
    if (workflow.status !== 201) throw new Error(JSON.stringify(workflow.body));
    const deployment = await this.json(`/api/workflows/${workflow.body.workflow_id}/deploy`, {
      method: 'POST',
      body: { deployment_name: name, runtime_config },
    });
    if (deployment.status !== 201) throw new Error(JSON.stringify(deployment.body));
    return name;
  }

  execute<Body>(body: object) {
    return this.json<Body>('/api/workflows/execute', { method: 'POST', body });
  }

  /** Starts a streaming execution. */
  async stream(
    body: object,
    options: { headers?: Record<string, string>; signal?: AbortSignal } = {},
  ): Promise<EventStream> {
    return new EventStream(
      await this.fetch('/api/workflows/execute/stream', { method: 'POST', body, ...options }),
    );
  }

  /** Follows an execution from after a chunk. */
  async follow(
    executionId: string,
    after?: number,
    { headers, signal }: { headers?: Record<string, string>; signal?: AbortSignal } = {},
  ): Promise<EventStream> {
    const cursor: Record<string, string> =
      after === undefined ? {} : { 'Last-Event-ID': `${executionId}:${after}` };
    return new EventStream(
      await this.fetch(`/api/executions/${executionId}/stream`, {
        headers: { ...cursor, ...headers },
        signal,
      }),
    );
  }

  /** The value of a metric without labels. */
  async metric(name: string): Promise<number> {
    const text = await (await this.fetch('/metrics')).text();
    return Number(new RegExp(`^${name} (\\S+)$`, 'm').exec(text)?.[1]);
  }

  private fetch(
    path: string,
    {
      method = 'GET',
      body,
      headers,
      signal,
    }: { method?: string; body?: unknown; headers?: Record<string, string>; signal?: AbortSignal } = {},
  ): Promise<Response> {
    return fetch(this.url + path, {
      method,
      signal,
      headers: { ...(body === undefined ? {} : { 'Content-Type': 'application/json' }), ...headers },
      body: body === undefined ? undefined : typeof body === 'string' ? body : JSON.stringify(body),
    });
  }
}

/** The answer of a streaming route. */
export class EventStream implements AsyncIterable<Frame> {
  readonly status: number;
  readonly headers: Headers;
  /** The bytes received so far, as text. */
  raw = '';

  constructor(readonly response: Response) {
    this.status = response.status;
    this.headers = response.headers;
  }

  get executionId(): string {
    return this.headers.get('content-location')?.split('/').at(-1) ?? '';
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<Frame> {
    const frames: Frame[] = [];
    const parser = createParser({
      onEvent: ({ id = '', data }) => frames.push({ id, data, chunk: JSON.parse(data) as Chunk }),
    });
    const decoder = new TextDecoder('utf-8', { fatal: true });
    for await (const bytes of this.response.body ?? []) {
      const text = decoder.decode(bytes as Uint8Array, { stream: true });
      this.raw += text;
      parser.feed(text);
      yield* frames.splice(0);
    }
  }

  async frames(): Promise<Frame[]> {
    const frames: Frame[] = [];
    for await (const frame of this) frames.push(frame);
    return frames;
  }

  /** Reads this many frames, then closes the connection. */
  async take(count: number): Promise<Frame[]> {
    const frames: Frame[] = [];
    for await (const frame of this) if (frames.push(frame) === count) break;
    return frames;
  }
}

/** The text that an agent (or all of them) said. */
export function textOf(frames: Frame[], agentId?: string): string {
  return frames
    .filter(({ chunk }) => chunk.type === 'content' && (agentId === undefined || chunk.agent_id === agentId))
    .map(({ chunk }) => chunk.data)
    .join('');
}

/** What is left of a stream when a client has discarded what the `restarted` chunks say. */
export function kept(frames: Frame[]): Frame[] {
  const restarts = frames.map(({ chunk }) => chunk).filter(({ status }) => status === 'restarted');
  return frames.filter(({ chunk: { type, agent_id, sequence } }) =>
    restarts.every(
      (restart) =>
        type !== 'content' ||
        agent_id !== restart.agent_id ||
        sequence <= (restart.discard_after ?? 0) ||
        sequence > restart.sequence,
    ),
  );
}

/** Whether a chunk is the last one of its execution. */
export function isTerminal({ chunk: { status } }: Frame): boolean {
  return status === 'completed' || status === 'error' || status === 'cancelled';
}

/** What is wrong with a whole stream: its order, its ids, its ends. Nothing, if it is as promised. */
export function faultsOfStream(frames: Frame[], executionId: string): string[] {
  const faults: string[] = [];
  frames.forEach((frame, index) => {
    const { id, chunk } = frame;
    const isLast = index === frames.length - 1;
    if (chunk.sequence !== index + 1) faults.push(`chunk ${index + 1} has sequence ${chunk.sequence}`);
    if (id !== `${executionId}:${index + 1}`) faults.push(`chunk ${index + 1} has the id ${id}`);
    if (chunk.execution_id !== executionId)
      faults.push(`chunk ${index + 1} is of execution ${chunk.execution_id}`);
    if ((index === 0) !== (chunk.status === 'started'))
      faults.push(`chunk ${index + 1} has status ${chunk.status}`);
    if (isLast !== isTerminal(frame))
      faults.push(`chunk ${index + 1} of ${frames.length} has status ${chunk.status}`);
  });
  if (frames.length === 0) faults.push('there is no chunk');
  return faults;
}

/** Resolves once `condition` answers with something. Fails after `ms`, which only bounds a test that hangs. */
export async function until<Result>(
  condition: () => Promise<Result | undefined> | Result | undefined,
  ms = 60_000,
): Promise<Result> {
  const giveUp = Date.now() + ms;
  for (;;) {
    const result = await condition();
    if (result !== undefined && result !== false) return result;
    if (Date.now() > giveUp)
      throw new Error(`The condition was not met within ${ms} ms: ${condition.toString()}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

/** Resolves once `check` passes; fails as it failed last. `ms` only bounds a test that hangs. */
export async function untilPasses(check: () => Promise<void>, ms = 60_000): Promise<void> {
  const giveUp = Date.now() + ms;
  for (;;) {
    try {
      return await check();
    } catch (error) {
      if (Date.now() > giveUp) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

/** One `offline/echo` agent. */
export const echo = (fields: object = {}) => ({
  agents: [{ agent_id: 'echo', agent_type: 'llm', config: { model: 'offline/echo', ...fields } }],
});

/** One agent of a model provider named `upstream`. */
export const upstreamAgent = (fields: object = {}) => ({
  agents: [
    { agent_id: 'writer', agent_type: 'llm', config: { model: 'upstream/any', max_retries: 0, ...fields } },
  ],
});

import type { BatchAcceptedDto, BatchDto, BatchResultDto } from '../../src/batches/batches.dto.js';
import type { BatchData } from '../../src/event-log/chunk.js';
import { EventStream, isTerminal } from './studio.js';
import type { Frame, Studio } from './studio.js';

/** A problem document, as far as tests read it. */
export interface Problem {
  code: string;
  detail: string;
  errors?: { pointer: string; detail: string }[];
}

export const EXECUTE_BATCH = '/api/workflows/execute/batch';
export const STREAM_BATCH = '/api/workflows/execute/batch/stream';

interface Options {
  headers?: Record<string, string>;
  signal?: AbortSignal;
}

/** The routes of batches on a running server. */
export class BatchRoutes {
  constructor(readonly studio: Studio) {}

  /** Accepts a batch that nobody follows. Fails if it is refused. */
  async accept(body: object, headers: Record<string, string> = {}): Promise<BatchAcceptedDto> {
    const answer = await this.ask<BatchAcceptedDto>(body, headers);
    if (answer.status !== 202) throw new Error(`${answer.status}: ${JSON.stringify(answer.body)}`);
    return answer.body;
  }

  /** What a batch is answered with, be it refused. */
  ask<Body = Problem>(body: unknown, headers: Record<string, string> = {}, path = EXECUTE_BATCH) {
    return this.studio.json<Body>(path, { method: 'POST', body, headers });
  }

  async stream(body: object, { headers, signal }: Options = {}): Promise<EventStream> {
    const answer = await fetch(this.studio.url + STREAM_BATCH, {
      method: 'POST',
      headers: { 'Content-Type': 'application/json', ...headers },
      body: JSON.stringify(body),
      signal,
    });
    return new EventStream(answer);
  }

  /** Follows the merged stream, from after a position. */
  async follow(batchId: string, after?: number, { headers, signal }: Options = {}): Promise<EventStream> {
    const cursor: Record<string, string> =
      after === undefined ? {} : { 'Last-Event-ID': `${batchId}:${after}` };
    const answer = await fetch(`${this.studio.url}/api/batches/${batchId}/stream`, {
      headers: { ...cursor, ...headers },
      signal,
    });
    return new EventStream(answer);
  }

  async whole(batchId: string): Promise<Frame[]> {
    return (await this.follow(batchId)).frames();
  }

  async get(batchId: string, query = '?limit=1000'): Promise<BatchDto> {
    return (await this.studio.json<BatchDto>(`/api/batches/${batchId}${query}`)).body;
  }

  cancel(batchId: string) {
    return this.studio.json<BatchDto & Problem>(`/api/batches/${batchId}/cancel`, { method: 'POST' });
  }

  /** The lines of the results, parsed. */
  async results(batchId: string): Promise<BatchResultDto[]> {
    const answer = await fetch(`${this.studio.url}/api/batches/${batchId}/results`);
    const text = await answer.text();
    if (!answer.ok || !text.endsWith('\n')) throw new Error(`${answer.status}: ${text.slice(-300)}`);
    return text
      .slice(0, -1)
      .split('\n')
      .map((line) => JSON.parse(line) as BatchResultDto);
  }
}

/** What a frame is of: an item by its name, or nothing if it is of the batch itself. */
export const itemOf = ({ chunk }: Frame) => chunk.item_id;

/** The frames of each item, in their order. */
export function byItem(frames: Frame[]): Map<string, Frame[]> {
  const items = new Map<string, Frame[]>();
  for (const frame of frames) {
    const item = itemOf(frame);
    if (item !== undefined) items.set(item, [...(items.get(item) ?? []), frame]);
  }
  return items;
}

/** What was sent, without what differs from one connection to the next. */
export const linesOf = (frames: Frame[]) => frames.map(({ id, data }) => `${id} ${data}`);

/** What is wrong with a whole merged stream: positions, ends, and the order within each item. Nothing, if it is as promised. */
export function faultsOfMerged(frames: Frame[], batchId: string): string[] {
  const [head] = frames;
  const tail = frames.at(-1);
  if (!head || !tail) return ['there is no chunk'];
  const begin = head.chunk.data as BatchData | undefined;
  const end = tail.chunk.data as BatchData | undefined;
  const announced = begin?.items ?? [];
  const faults = faultsOfFrames(frames, batchId);
  for (const [item, chunks] of byItem(frames)) {
    const executionId = announced.find(({ item_id }) => item_id === item)?.execution_id;
    const ended = end?.items?.find(({ item_id }) => item_id === item);
    if (executionId === undefined && !begin?.items_omitted) faults.push(`item ${item} was not announced`);
    if (
      !end?.items_omitted &&
      (ended?.execution_id !== executionId || ended?.status !== chunks.at(-1)?.chunk.status)
    )
      faults.push(`item ${item} ended as ${chunks.at(-1)?.chunk.status}, and is told as ${ended?.status}`);
    chunks.forEach(({ chunk }, index) => {
      const is = `chunk ${index + 1} of item ${item}`;
      if (chunk.sequence !== index + 1) faults.push(`${is} has sequence ${chunk.sequence}`);
      if (chunk.execution_id !== executionId && !begin?.items_omitted)
        faults.push(`${is} is of execution ${chunk.execution_id}`);
      if ((index === 0) !== (chunk.status === 'started')) faults.push(`${is} has status ${chunk.status}`);
    });
    const ends = chunks.flatMap((frame, index) => (isTerminal(frame) ? [index] : []));
    if (ends.length !== 1 || ends[0] !== chunks.length - 1)
      faults.push(
        `item ${item} of ${chunks.length} chunks has its terminal ones at ${ends.join() || 'none'}`,
      );
  }
  if (byItem(frames).size !== announced.length && !begin?.items_omitted)
    faults.push(`${byItem(frames).size} of ${announced.length} items have chunks`);
  const order = (items: NonNullable<BatchData['items']>) => items.map(({ item_id }) => item_id).join();
  if (!end?.items_omitted && order(end?.items ?? []) !== order(announced))
    faults.push('the items at the end are in another order');
  return faults;
}

function faultsOfFrames(frames: Frame[], batchId: string): string[] {
  const faults: string[] = [];
  frames.forEach((frame, index) => {
    const { id, chunk } = frame;
    const is = `event ${index + 1} of ${frames.length}`;
    if (id !== `${batchId}:${index + 1}`) faults.push(`${is} has the id ${id}`);
    if (chunk.batch_id !== batchId) faults.push(`${is} is of batch ${chunk.batch_id}`);
    const isOfBatch = chunk.item_id === undefined;
    if (isOfBatch !== (chunk.execution_id === undefined)) faults.push(`${is} is of an item without a name`);
    if (isOfBatch !== (index === 0 || index === frames.length - 1))
      faults.push(`${is} is ${isOfBatch ? '' : 'not '}of the batch itself`);
  });
  const [head, tail] = [frames[0]?.chunk, frames.at(-1)?.chunk];
  if (head?.status !== 'started' || head.sequence !== 1) faults.push(`it begins with ${head?.status}`);
  if ((tail?.status !== 'completed' && tail?.status !== 'cancelled') || tail.sequence !== 2)
    faults.push(`it ends with ${tail?.status}, sequence ${tail?.sequence}`);
  return faults;
}

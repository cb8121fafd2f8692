import type { TerminalStatus } from '../executions/status.js';

/** `status` of a chunk: `started` is always the first, one of {@link TerminalStatus} always the last, exactly once. */
export type ChunkStatus = 'started' | TerminalStatus | 'restarted';

/** Where the steps of an execution stand; `progress` is the share of finished ones, from 0 to 1. */
export interface StepProgress {
  step_id: string;
  agent_id: string;
  status: string;
  completed_steps: number;
  total_steps: number;
  progress: number;
}

/** How many items of a batch there are, and how many of them are in each state. */
export interface ItemCounts {
  total: number;
  queued: number;
  running: number;
  completed: number;
  error: number;
  cancelled: number;
}

/** `data` of a batch's own chunks: its items in their order, and once it has ended their ends and where the results are. */
export interface BatchData {
  /** Left out, and `items_omitted` said, where the chunk's line would be too long. */
  items?: { item_id: string; execution_id: string; status?: string; self?: string }[];
  items_omitted?: true;
  counts?: ItemCounts;
  results?: string;
}

/** What a producer hands to the log; the log adds the rest of the {@link Chunk}. Keys are in the order of the wire. */
export interface ChunkContent {
  type: 'status' | 'content' | 'progress';
  data?: string | StepProgress | BatchData;
  status?: ChunkStatus;
  error?: string;
  code?: string;
  agent_id?: string;
  /** Only with `restarted`: content of `agent_id` with a higher `sequence` than this, up to this chunk, is void. */
  discard_after?: number;
}

/** One JSON object of the stream, as clients receive it in the `data:` line of an event. */
export interface Chunk extends ChunkContent {
  deployment_name: string;
  workflow_id: string;
  /** Absent in the two chunks of a batch itself. */
  execution_id?: string;
  /** With `item_id`: the batch that the execution is an item of. */
  batch_id?: string;
  item_id?: string;
  /** 1, 2, 3 … without gaps within an execution. */
  sequence: number;
  /** ISO 8601 in UTC with milliseconds. */
  timestamp: string;
}

/** The part of every chunk that does not change within an execution. */
export interface ChunkOrigin {
  deployment_name: string;
  workflow_id: string;
  execution_id?: string;
  batch_id?: string | null;
  item_id?: string | null;
}

/** Line breaks of Unicode that JSON leaves as they are; Python's `splitlines` and others cut at them. */
const UNICODE_LINE_BREAKS = /[\u0085\u2028\u2029]/g;
const escapeLineBreak = (character: string) => `\\u${character.charCodeAt(0).toString(16).padStart(4, '0')}`;

/**
 * Serializes the chunks of one execution. A chunk is serialized once: the same string goes into the log's row and into
 * every client's frame. It never contains a line break, so a row can join chunks by LF, and a client may split lines as
 * its language does. Lone surrogates are escaped (ECMA-262 well-formed JSON.stringify), so it is always valid UTF-8.
 */
export class ChunkSerializer {
  private readonly origin: string;
  private time = NaN;
  private timestamp = '';

  constructor({ deployment_name, workflow_id, execution_id, batch_id, item_id }: ChunkOrigin) {
    const ofBatch = { batch_id: batch_id ?? undefined, item_id: item_id ?? undefined };
    this.origin = toJson({ deployment_name, workflow_id, execution_id, ...ofBatch }).slice(1, -1);
  }

  /** Puts the parts of the JSON together itself: with thousands of chunks a second, a whole object each time costs too much. */
  serialize(content: ChunkContent, sequence: number, time = Date.now()): string {
    const { type, data, status, error, code, agent_id, discard_after } = content;
    let json = `{"type":"${type}"`;
    if (data !== undefined) json += `,"data":${toJson(data)}`;
    if (status !== undefined) json += `,"status":"${status}"`;
    if (error !== undefined) json += `,"error":${toJson(error)}`;
    if (code !== undefined) json += `,"code":"${code}"`;
    json += `,${this.origin},"sequence":${sequence}`;
    if (agent_id !== undefined) json += `,"agent_id":"${agent_id}"`;
    if (discard_after !== undefined) json += `,"discard_after":${discard_after}`;
    return `${json},"timestamp":"${this.format(time)}"}`;
  }

  /** Many chunks share a millisecond. */
  private format(time: number): string {
    if (time !== this.time) {
      this.time = time;
      this.timestamp = new Date(time).toISOString();
    }
    return this.timestamp;
  }
}

/** JSON in one line, whichever way its reader splits lines. */
export function toJson(value: unknown): string {
  return JSON.stringify(value).replace(UNICODE_LINE_BREAKS, escapeLineBreak);
}

const TERMINAL_CHUNK = /^\{"type":"status","status":"(?:completed|error|cancelled)"/;

/** Whether a serialized chunk is the last one of its execution. */
export function isTerminalChunk(line: string | undefined): boolean {
  return line !== undefined && TERMINAL_CHUNK.test(line);
}

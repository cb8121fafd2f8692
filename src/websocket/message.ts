import { AppError } from '../errors.js';
import type { Fault } from '../errors.js';
import { toPointer } from '../engine/validation.js';
import { checkJson, checkJsonText } from '../json-body.js';
import type { JsonLimits } from '../json-body.js';
import { quoted } from '../dto.js';
import { REQUEST_EVENTS } from './websocket.dto.js';
import type { ClientMessage, MessageId, RequestEvent } from './websocket.dto.js';

const MEMBERS = ['event', 'id', 'data'];
const MOST_ID_CHARACTERS = 200;

/** What a text of a client is. */
export type ParsedMessage =
  | { kind: 'no json' }
  | { kind: 'refused'; error: AppError; id: MessageId | undefined }
  /** `stream` names the stream that `subscribe` and `unsubscribe` are about. */
  | { kind: 'message'; message: ClientMessage; stream: string | undefined };

/** Reads a message up to its `data`, which is checked for its depth and its keys only. */
export function parseMessage(text: string, limits: JsonLimits): ParsedMessage {
  let message: unknown;
  try {
    checkJsonText(text, limits);
    message = JSON.parse(text);
  } catch (error) {
    return error instanceof AppError ? { kind: 'refused', error, id: undefined } : { kind: 'no json' };
  }
  const { faults, event, id, data } = membersOf(message);
  if (faults.length > 0 || !event) return { kind: 'refused', error: refusal(faults), id };
  try {
    checkJson(data, limits);
  } catch (error) {
    return { kind: 'refused', error: withinData(error), id };
  }
  return { kind: 'message', message: { event, id, data }, stream: streamOf(event, data) };
}

/** A fault of `data` is told by its place in the message. */
export function withinData(error: unknown): AppError {
  if (!(error instanceof AppError)) throw error;
  if (!error.faults) return error;
  const faults = error.faults.map(({ pointer, detail }) => ({ pointer: `/data${pointer}`, detail }));
  return new AppError(error.code, error.message, { faults, retryAfter: error.retryAfter, cause: error });
}

interface Members {
  faults: Fault[];
  event?: RequestEvent;
  id?: MessageId;
  data?: unknown;
}

function membersOf(message: unknown): Members {
  if (typeof message !== 'object' || message === null || Array.isArray(message)) {
    return { faults: [{ pointer: '', detail: 'must be an object: {"event": …, "id"?: …, "data"?: …}' }] };
  }
  const { event, id, data } = message as Record<string, unknown>;
  const faults = Object.keys(message)
    .filter((name) => !MEMBERS.includes(name))
    .slice(0, 10)
    .map((name) => ({ pointer: toPointer('', name.slice(0, 100)), detail: 'is not a member of a message' }));
  const known = REQUEST_EVENTS.find((name) => name === event);
  if (!known) {
    const given = typeof event === 'string' ? `, and is ${quoted(event)}` : '';
    faults.unshift({ pointer: '/event', detail: `must be one of ${REQUEST_EVENTS.join(', ')}${given}` });
  }
  const isId =
    (typeof id === 'string' && id.length <= MOST_ID_CHARACTERS) ||
    (typeof id === 'number' && Number.isFinite(id) && Math.abs(id) <= Number.MAX_SAFE_INTEGER);
  if (id !== undefined && !isId) {
    faults.push({
      pointer: '/id',
      detail: `must be a number or a string of ${MOST_ID_CHARACTERS} characters at most`,
    });
  }
  return { faults, event: known, id: isId ? id : undefined, data };
}

function refusal(faults: Fault[]): AppError {
  const [first] = faults;
  const what = first ? `${first.pointer} ${first.detail}`.trim() : 'it has a fault';
  return new AppError('validation_failed', `The message is not valid: ${what}.`, { faults });
}

function streamOf(event: RequestEvent, data: unknown): string | undefined {
  if (event !== 'subscribe' && event !== 'unsubscribe') return undefined;
  const { execution_id, batch_id, deployment_name } = (data ?? {}) as Record<string, unknown>;
  return JSON.stringify([execution_id, batch_id, deployment_name]).toLowerCase();
}

// What all servers of the benchmark send, and at which pace.
import { randomBytes, randomUUID } from 'node:crypto';

/** Chunks of content in a stream, unless the model's name says otherwise; `started` and `completed` come on top. */
export const CHUNKS = 200;
export const DEPLOYMENT = 'benchmark';
export const AGENT = 'writer';
const WORKFLOW_ID = randomUUID();

export const SSE_HEADERS = {
  'Content-Type': 'text/event-stream; charset=utf-8',
  'Cache-Control': 'no-cache, no-transform',
  'X-Accel-Buffering': 'no',
};

const TOKEN_CHARACTERS = 5;
/** Of long tokens: text that PostgreSQL can't compress to next to nothing. */
const FILLER = randomBytes(3 * 2 ** 14).toString('base64');

/** What a model answers, unless its name says otherwise. */
const ANSWER = {
  /** Pieces of text. */
  tokens: CHUNKS,
  /** Characters of each. */
  size: TOKEN_CHARACTERS,
  /** ms before each token; 0: all at once. */
  delay: 0,
  /** ms before the answer begins. */
  wait: 0,
  /** 1: the answer has no end after its last token. */
  open: 0,
  /** 1: each token is the moment at which it is written, see {@link clockUs}. */
  stamp: 0,
};

/** Name of the model that answers so; the same request goes to every server. */
export function modelName({ tokens = ANSWER.tokens, delay = ANSWER.delay, ...others } = {}) {
  return new URLSearchParams({ tokens, delay, ...others }).toString();
}

/** What the model of this name answers. */
export function readModelName(name) {
  const given = [...new URLSearchParams(name)].map(([key, value]) => [key, Number(value)]);
  return { ...ANSWER, ...Object.fromEntries(given) };
}

/** µs of a clock that all processes of this machine share. */
export function clockUs() {
  return Number(process.hrtime.bigint() / 1000n);
}

/** Token at an index from 0. */
export function token(index, size = TOKEN_CHARACTERS) {
  const number = ` ${String(index).padStart(TOKEN_CHARACTERS - 1, '0')}`;
  const begin = (index * 61) % (FILLER.length / 2);
  return number + FILLER.slice(begin, begin + size - number.length);
}

/** The model that a request to one of the servers asks for, without its provider. */
export async function readModel(request) {
  const pieces = [];
  for await (const piece of request) pieces.push(piece);
  const { runtime_overrides } = JSON.parse(Buffer.concat(pieces).toString());
  return runtime_overrides.model.split('/')[1];
}

/** An SSE frame of Agent Studio's wire format. */
export function frame(executionId, sequence, { type, data, status }) {
  const chunk = {
    type,
    data,
    status,
    deployment_name: DEPLOYMENT,
    workflow_id: WORKFLOW_ID,
    execution_id: executionId,
    sequence,
    agent_id: type === 'content' ? AGENT : undefined,
    timestamp: new Date().toISOString(),
  };
  return `data: ${JSON.stringify(chunk)}\nid: ${executionId}:${sequence}\n\n`;
}

/**
 * Calls `write(index)` for 0 … count-1, each `delay` ms after the one before, and catches up when it was held up; then
 * `end()`. It stops once `isOver()`.
 */
export function pace({ count, delay }, { write, end, isOver }) {
  const begun = performance.now();
  let index = 0;
  const tick = () => {
    if (isOver()) return;
    const now = performance.now() - begun;
    // A timer of Node can be up to 1 ms early.
    while (index < count && (index + 1) * delay <= now + 0.5) write(index++);
    if (index === count) end();
    else setTimeout(tick, Math.max(1, Math.ceil((index + 1) * delay - now)));
  };
  setTimeout(tick, delay);
}

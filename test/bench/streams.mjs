// What all servers of the benchmark send, and at which pace.
import { randomUUID } from 'node:crypto';

/** Chunks of content in a stream; `started` and `completed` come on top. */
export const CHUNKS = 200;
export const DEPLOYMENT = 'benchmark';
export const AGENT = 'writer';
const WORKFLOW_ID = randomUUID();

export const SSE_HEADERS = {
  'Content-Type': 'text/event-stream; charset=utf-8',
  'Cache-Control': 'no-cache, no-transform',
  'X-Accel-Buffering': 'no',
};

/** Name of the model that waits so many ms before each token; the same request goes to every server. */
export function modelName(delay) {
  return `${CHUNKS}-tokens-${delay}ms`;
}

/** ms before each token. */
export function delayOf(model) {
  return Number(/-(\d+)ms$/.exec(model)[1]);
}

/** Token at an index from 0: five characters. */
export function token(index) {
  return ` ${String(index).padStart(4, '0')}`;
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
  return `id: ${executionId}:${sequence}\ndata: ${JSON.stringify(chunk)}\n\n`;
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

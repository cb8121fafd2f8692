import type { Readable } from 'node:stream';
import type { Dispatcher } from 'undici';
import { boundOf, type AnswerBound } from './answer-bounds.js';

/** A response of these statuses must not have a body (WHATWG Fetch, "null body status"). */
const NULL_BODY_STATUSES = new Set([204, 205, 304]);

const BROKEN_CONNECTION_CODES = new Set(['ECONNRESET', 'EPIPE', 'UND_ERR_SOCKET']);

/**
 * A `fetch` for the requests that model providers make: text bodies, no redirects (a key must not follow one to another
 * host), no time limits of its own. It stands on undici's `request`, because the bodies of undici's `fetch` cost a
 * quarter more CPU per token when tokens come in bursts, and its limits would end silences that `timeout_ms` allows.
 * Of an answer `mostBytes` are kept at most, see {@link boundOf}.
 */
export function createUpstreamFetch(dispatcher: Dispatcher, mostBytes: number): typeof fetch {
  return async (input, init) => {
    const signal = init?.signal ?? undefined;
    const { origin, pathname, search } = new URL(input instanceof Request ? input.url : input);
    const options: Dispatcher.RequestOptions = {
      origin,
      path: `${pathname}${search}`,
      method: init?.method === 'POST' ? 'POST' : 'GET',
      headers: { ...Object.fromEntries(new Headers(init?.headers)), 'accept-encoding': 'identity' },
      body: typeof init?.body === 'string' ? init.body : null,
      signal,
    };
    try {
      return toResponse(await dispatcher.request(options), mostBytes);
    } catch (error) {
      if (signal?.aborted || !isBrokenConnection(error)) throw error;
      // A kept-alive connection that the upstream closed at the same moment breaks on its next use, before any byte of
      // an answer; a second try gets a new one.
      return toResponse(await dispatcher.request(options), mostBytes);
    }
  };
}

function isBrokenConnection(error: unknown): boolean {
  return (
    typeof error === 'object' &&
    error !== null &&
    'code' in error &&
    BROKEN_CONNECTION_CODES.has(String(error.code))
  );
}

function toResponse(
  { statusCode, statusText, headers, body }: Dispatcher.ResponseData,
  mostBytes: number,
): Response {
  const entries = Object.entries(headers).flatMap(([name, values]) =>
    [values ?? []].flat().map((value): [string, string] => [name, value]),
  );
  const bound = boundOf({ status: statusCode, type: String(headers['content-type'] ?? '') }, mostBytes);
  const content = NULL_BODY_STATUSES.has(statusCode) ? null : toWebStream(body, bound);
  if (content === null) body.resume();
  return new Response(content, { status: statusCode, statusText, headers: entries });
}

/** Reads on only when asked, and takes all that has come in one piece, so that a burst is one pass through the parsers. */
function toWebStream(body: Readable, bound: AnswerBound): ReadableStream<Uint8Array> {
  const pieces = body[Symbol.asyncIterator]();
  // The iterator throws what the body fails with; without a listener the same error would end the process as well.
  body.on('error', () => undefined);
  return new ReadableStream<Uint8Array>(
    {
      async pull(controller) {
        const piece: IteratorResult<Uint8Array, void> = await pieces.next();
        if (piece.done) return controller.close();
        if (isCut(body, bound, piece.value)) return controller.close();
        controller.enqueue(piece.value);
      },
      cancel() {
        body.destroy();
      },
    },
    { highWaterMark: 0 },
  );
}

/** Whether nothing more of the body is read; its connection is closed then, and when the bound throws. */
function isCut(body: Readable, bound: AnswerBound, piece: Uint8Array): boolean {
  let isRead = false;
  try {
    isRead = !bound.count(piece);
    return !isRead;
  } finally {
    if (!isRead) body.destroy();
  }
}

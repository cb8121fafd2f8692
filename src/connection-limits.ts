import { STATUS_CODES } from 'node:http';
import type { IncomingMessage, Server, ServerOptions, ServerResponse } from 'node:http';
import type { Duplex } from 'node:stream';
import type { NextFunction, Request, Response } from 'express';
import { v4 as uuidv4 } from 'uuid';
import type { Config } from './config.js';
import { AppError } from './errors.js';
import type { ErrorCode } from './errors.js';
import { problemOf } from './problem.filter.js';

/** A head may take so long to arrive, ms, and may have so many bytes. */
const HEAD_TIMEOUT_MS = 10_000;
const MAX_HEAD_BYTES = 16_384;
/** How often late requests are looked for, ms. */
const CHECK_MS = 1000;

type Limits = Pick<
  Config,
  'MAX_CLIENT_CONNECTIONS' | 'REQUEST_TIMEOUT_MS' | 'KEEP_ALIVE_TIMEOUT_MS' | 'ANSWER_TIMEOUT_MS'
>;

/** What Node bounds by itself; set here, because its defaults change from version to version. */
export function serverOptions(limits: Limits): ServerOptions {
  return {
    headersTimeout: Math.min(HEAD_TIMEOUT_MS, limits.REQUEST_TIMEOUT_MS),
    requestTimeout: limits.REQUEST_TIMEOUT_MS,
    keepAliveTimeout: limits.KEEP_ALIVE_TIMEOUT_MS,
    connectionsCheckingInterval: CHECK_MS,
    maxHeaderSize: MAX_HEAD_BYTES,
    requireHostHeader: false, // its answer would be no problem document: requireOneHost
  };
}

/**
 * Bounds what a client's connections can hold: there are `MAX_CLIENT_CONNECTIONS` of them, a request that does not arrive in
 * time is answered with `request_timeout`, what is no HTTP with `bad_request`, and a connection on which nothing of a complete
 * answer was taken for `ANSWER_TIMEOUT_MS` is cut. Streams that are not complete may be read as slowly as one likes.
 */
export function limitConnections(server: Server, limits: Limits): void {
  server.maxConnections = limits.MAX_CLIENT_CONNECTIONS;
  const answers = new WeakMap<Duplex, ServerResponse>();
  server.prependListener('request', (request: IncomingMessage, response: ServerResponse) => {
    const { socket } = request;
    answers.set(socket, response);
    // Node takes the time-out back with the next request, and counts it from the last progress.
    response.once('prefinish', () => {
      if (socket.writableLength > 0) socket.setTimeout(limits.ANSWER_TIMEOUT_MS);
    });
  });
  // Node would answer without a body; whoever expects something else than 100-continue may be served all the same.
  server.on('checkExpectation', (request, response) => server.emit('request', request, response));
  server.on('clientError', (error: NodeJS.ErrnoException, socket: Duplex) => {
    const answer = answers.get(socket);
    const isAnswering = answer !== undefined && answer.headersSent && !answer.writableFinished;
    if (!socket.writable || isAnswering) socket.destroy();
    else answerDirectly(socket, refusalOf(error), { requestId: uuidv4(), path: answer?.req.url ?? '/' });
  });
}

/** Refuses a request that does not say once to whom it goes (RFC 9112, section 3.2). */
export function requireOneHost(request: Request, _response: Response, next: NextFunction): void {
  const { rawHeaders } = request;
  let hosts = 0;
  for (let index = 0; index < rawHeaders.length; index += 2) {
    if (rawHeaders[index]?.length === 4 && rawHeaders[index]?.toLowerCase() === 'host') hosts++;
  }
  if (hosts > 1 || (hosts === 0 && request.httpVersion !== '1.0')) {
    throw new AppError('bad_request', `The request has ${hosts} Host headers. Send one.`);
  }
  next();
}

function refusalOf({ code }: NodeJS.ErrnoException): AppError {
  const [refusal, text]: [ErrorCode, string] =
    code === 'ERR_HTTP_REQUEST_TIMEOUT'
      ? ['request_timeout', 'The request did not arrive in time. Send it at once.']
      : code === 'HPE_HEADER_OVERFLOW'
        ? ['headers_too_large', `The head of the request has more than ${MAX_HEAD_BYTES} bytes. Send less.`]
        : ['bad_request', 'This is not a request in HTTP/1.1.'];
  return new AppError(refusal, text);
}

/** Answers with a problem (RFC 9457) where there is no response for it, and closes the connection. */
export function answerDirectly(
  socket: Duplex,
  error: AppError,
  { requestId, path, headers = [] }: { requestId: string; path: string; headers?: string[] },
): void {
  const body = JSON.stringify(problemOf(error, { id: requestId, path: path.split('?')[0] ?? '/' }));
  const head = [
    `HTTP/1.1 ${error.status} ${STATUS_CODES[error.status]}`,
    'Connection: close',
    'Content-Type: application/problem+json; charset=utf-8',
    `Content-Length: ${Buffer.byteLength(body)}`,
    `X-Request-Id: ${requestId}`,
    ...headers,
  ];
  if (error.retryAfter !== undefined) head.push(`Retry-After: ${Math.ceil(error.retryAfter)}`);
  socket.once('finish', () => socket.destroy());
  socket.end(`${head.join('\r\n')}\r\n\r\n${body}`);
}

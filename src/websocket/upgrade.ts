import { IncomingMessage } from 'node:http';
import type { Duplex } from 'node:stream';
import { v4 as uuidv4 } from 'uuid';
import type { ServerConfig } from '../config.js';
import { answerDirectly } from '../connection-limits.js';
import { AppError } from '../errors.js';
import { REQUEST_ID } from '../json-logger.js';
import { WEBSOCKET_PATH } from './websocket.dto.js';

/** How long a peer has to answer the end of a WebSocket; then its connection is cut, ms. */
export const DRAIN_MS = 2000;

/**
 * A request that can only be upgraded to a WebSocket. As soon as a server takes upgrades, Node hands it all of them, and
 * some clients offer HTTP/2 with every request (`Upgrade: h2c`), which a server may ignore (RFC 9110, section 7.8).
 */
export class WebSocketRequest extends IncomingMessage {
  private wantsUpgrade: boolean | null = null;

  get upgrade(): boolean | null {
    const isHandshake = this.headers.upgrade?.toLowerCase() === 'websocket' || this.method === 'CONNECT';
    return this.wantsUpgrade && isHandshake;
  }

  /** Node sets it while it reads the head. */
  set upgrade(wanted: boolean | null) {
    this.wantsUpgrade = wanted;
  }
}

/** The name of a request in the log and in problems: the client's own, or a new one. */
export function requestIdOf(request: IncomingMessage): string {
  const given = request.headers['x-request-id'];
  return typeof given === 'string' && REQUEST_ID.test(given) ? given : uuidv4();
}

/** The path of a request, without its query string. */
export function pathOf(request: IncomingMessage): string {
  return request.url?.split('?')[0] ?? '/';
}

/**
 * Throws why a WebSocket is not opened. A page may connect to any server with the user's network and addresses, and no
 * browser asks before, so its origin is checked here (RFC 6455, section 10.2).
 */
export function checkUpgrade(
  request: IncomingMessage,
  { config, draining }: { config: ServerConfig; draining: boolean },
): void {
  if (config.ROLE === 'worker') {
    throw new AppError(
      'not_found',
      'This process only runs executions (ROLE=worker). Ask one with ROLE=api or all.',
    );
  }
  if (pathOf(request) !== WEBSOCKET_PATH) {
    throw new AppError('not_found', `There is no WebSocket here. It is at ${WEBSOCKET_PATH}.`);
  }
  const { origin } = request.headers;
  if (origin !== undefined && !config.CORS_ORIGINS.includes('*') && !config.CORS_ORIGINS.includes(origin)) {
    throw new AppError('origin_not_allowed', 'Add the origin of the page to CORS_ORIGINS of the server.');
  }
  if (draining) {
    throw new AppError('unavailable', 'The server shuts down. Connect again.', { retryAfter: 1 });
  }
}

/** Answers a request for an upgrade with a problem (RFC 9457), and closes its connection. */
export function refuseUpgrade(
  socket: Duplex,
  error: AppError,
  { request, requestId }: { request: IncomingMessage; requestId: string },
): void {
  const headers = ['Sec-WebSocket-Version: 13'];
  answerDirectly(socket, error, { requestId, path: pathOf(request), headers });
}

import { createServer } from 'node:http';
import type { RequestListener, Server, ServerResponse } from 'node:http';
import { Server as NetServer } from 'node:net';
import { setImmediate as nextTurn, setTimeout as sleep } from 'node:timers/promises';
import { ExpressAdapter } from '@nestjs/platform-express';
import type { Config } from './config.js';
import { limitConnections, serverOptions } from './connection-limits.js';
import { WebSocketRequest } from './websocket/upgrade.js';

/**
 * How long connections that are in use get to hear, with their next answer, that they will be closed. A proxy that sends a
 * request on one at the moment of its end could not know whether it was received.
 */
const NOTICE_MS = 200;
/** How long answers that are under way may take when the server closes; then their connections are cut. */
const DRAIN_MS = 2000;
/** A connection whose answer is complete is kept for the next request, which will not come any more. */
const IDLE_CHECK_MS = 20;

/**
 * Closes the HTTP server so that a proxy in front can go on to another one: first it takes no new connections, then it lets
 * go of those that it has. Streams end as complete responses, and a client that reads nothing can't hold it up.
 */
export class DrainingAdapter extends ExpressAdapter {
  constructor(private readonly config: Config) {
    super();
  }

  override initHttpServer(): void {
    const listener = this.getInstance<RequestListener>();
    const options = { ...serverOptions(this.config), IncomingMessage: WebSocketRequest };
    const server = createServer(options, listener);
    limitConnections(server, this.config);
    this.setHttpServer(server);
  }

  override async close(): Promise<void> {
    const server: Server = this.getHttpServer();
    if (!server.listening) return;
    // Right after the turn in which waiting connections were accepted: those that wait at the end of a listener are reset.
    await nextTurn();
    // Not that of http.Server, which closes idle connections at once.
    const closed = new Promise((resolve) => NetServer.prototype.close.call(server, resolve));
    server.prependListener('request', (_request, response: ServerResponse) =>
      response.setHeader('Connection', 'close'),
    );
    await Promise.race([closed, sleep(NOTICE_MS)]);
    // After the turn's reads: a connection with a request that was not read yet looks idle.
    const idle = setInterval(() => setImmediate(() => server.closeIdleConnections()), IDLE_CHECK_MS);
    const last = setTimeout(() => server.closeAllConnections(), DRAIN_MS);
    await closed;
    clearInterval(idle);
    clearTimeout(last);
    await super.close(); // the timer of http.Server
  }
}

import { Logger } from '@nestjs/common';
import type { MessageMappingProperties } from '@nestjs/websockets';
import type { NestExpressApplication } from '@nestjs/platform-express';
import { WsAdapter } from '@nestjs/platform-ws';
import type { IncomingMessage, Server } from 'node:http';
import type { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import type { WebSocket, WebSocketServer } from 'ws';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { AppError } from '../errors.js';
import { translate } from '../problem.filter.js';
import type { ClientConnection } from './client-connection.js';
import { Connections } from './connections.js';
import { DRAIN_MS, checkUpgrade, pathOf, refuseUpgrade, requestIdOf } from './upgrade.js';
import type { ClientMessage } from './websocket.dto.js';

/**
 * Opens WebSockets on the HTTP server, and hands the messages of each to the gateway as its {@link ClientConnection} sees
 * fit. Nest's own adapter would queue for a client that does not read, take any origin, and drop what it does not understand.
 */
export class StudioWsAdapter extends WsAdapter {
  private readonly upgrades = new Logger('WebSocket');
  private readonly config: ServerConfig;
  private readonly connections: Connections;
  private readonly requestIds = new WeakMap<IncomingMessage, string>();

  constructor(app: NestExpressApplication) {
    super(app);
    this.config = app.get<ServerConfig>(CONFIG);
    this.connections = app.get(Connections);
  }

  override create(port: number, options: Record<string, unknown> = {}): WebSocketServer {
    const server = super.create(port, {
      ...options,
      maxPayload: this.config.MAX_BODY_BYTES,
      // Compression would take 300 KB for each socket, and its sender queues without a bound.
      perMessageDeflate: false,
      clientTracking: false,
      closeTimeout: DRAIN_MS,
      autoPong: false,
    }) as WebSocketServer;
    server.on('headers', (headers, request) => headers.push(`X-Request-Id: ${this.requestIds.get(request)}`));
    server.on('wsClientError', (error, socket, request) => {
      this.refuse(
        socket,
        request,
        new AppError('validation_failed', `The handshake is not valid: ${error.message}.`),
      );
    });
    return server;
  }

  override bindErrorHandler(server: WebSocketServer): WebSocketServer {
    return server; // a client's errors are no errors of the server
  }

  override bindMessageHandlers(client: ClientConnection, handlers: MessageMappingProperties[]): void {
    const byEvent = new Map(handlers.map(({ message, callback }) => [String(message), callback]));
    client.listen(async (message: ClientMessage) => {
      // Errors are told to the client by the gateway's filter.
      await (byEvent.get(message.event)?.(message) as Promise<void>);
    });
  }

  override bindClientDisconnect(): void {
    // Connections sees to it.
  }

  /** Its sockets were closed before, and the HTTP server waits for them. */
  override async close(): Promise<void> {}

  /** Upgrades are refused to the last, so the listener stays. */
  override async dispose(): Promise<void> {}

  protected override ensureHttpServerExists(port: number, httpServer?: Server): Server | undefined {
    if (!httpServer || this.httpServersRegistry.has(port)) return httpServer;
    this.httpServersRegistry.set(port, httpServer);
    httpServer.on('upgrade', (request, socket, head) => this.upgrade(request, socket, head));
    return httpServer;
  }

  private upgrade(request: IncomingMessage, socket: Duplex, head: Buffer): void {
    socket.on('error', destroy);
    this.requestIds.set(request, requestIdOf(request));
    try {
      checkUpgrade(request, { config: this.config, draining: this.connections.draining });
    } catch (error) {
      return this.refuse(socket, request, translate(error));
    }
    const [server] = this.wsServersRegistry.get(0) as [WebSocketServer];
    server.handleUpgrade(request, socket, head, (webSocket) => {
      socket.off('error', destroy);
      this.opened(server, webSocket, request);
    });
  }

  private opened(server: WebSocketServer, webSocket: WebSocket, request: IncomingMessage): void {
    const requestId = this.requestIds.get(request) ?? '';
    this.upgrades.log({ request_id: requestId, path: pathOf(request) }, 'WebSocket opened');
    server.emit('connection', this.connections.add(webSocket, { request, requestId }));
  }

  private refuse(socket: Duplex, request: IncomingMessage, error: AppError): void {
    const requestId = this.requestIds.get(request) ?? '';
    const line = { request_id: requestId, path: pathOf(request), status: error.status, code: error.code };
    this.upgrades.log(line, 'WebSocket refused');
    refuseUpgrade(socket, error, { request, requestId });
  }
}

function destroy(this: Socket): void {
  this.destroy();
}

import { setImmediate as nextTurn } from 'node:timers/promises';
import { Inject, Injectable, Logger } from '@nestjs/common';
import type { BeforeApplicationShutdown } from '@nestjs/common';
import type { IncomingMessage } from 'node:http';
import type { Socket } from 'node:net';
import type { WebSocket } from 'ws';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { jsonLimits } from '../json-body.js';
import { Metrics } from '../metrics.js';
import { Repeat } from '../repeat.js';
import { ClientConnection } from './client-connection.js';
import { Pulse } from './pulse.js';
import { DRAIN_MS } from './upgrade.js';
import { WEBSOCKET_PATH } from './websocket.dto.js';

interface OpenConnection {
  client: ClientConnection;
  pulse: Pulse;
}

/** The WebSockets of this process: counts them, looks whether their peers live, and closes them at the end. */
@Injectable()
export class Connections implements BeforeApplicationShutdown {
  private readonly logger = new Logger('WebSocket');
  private readonly open = new Set<OpenConnection>();
  private readonly beats: Repeat;
  /** No WebSocket is opened any more. */
  draining = false;

  constructor(
    @Inject(CONFIG) private readonly config: ServerConfig,
    private readonly metrics: Metrics,
  ) {
    this.beats = new Repeat(() => this.beat(), {
      everyMs: config.HEARTBEAT_INTERVAL_MS,
      onError: (error) => this.logger.error(error),
    });
  }

  /** In the same phase in which streams of events end. The clients go on at another process. */
  async beforeApplicationShutdown(): Promise<void> {
    this.draining = true;
    void this.beats.stop();
    const reason = 'The server shuts down. Connect again and subscribe with "after".';
    await Promise.all([...this.open].map(({ client }) => client.drain(1001, reason)));
  }

  /** Takes over a WebSocket that was just opened. */
  add(
    webSocket: WebSocket,
    { request, requestId }: { request: IncomingMessage; requestId: string },
  ): ClientConnection {
    const { socket } = request;
    const client = this.connect(webSocket, socket, requestId);
    const pulse = new Pulse(webSocket, socket, this.config.HEARTBEAT_INTERVAL_MS);
    const connection = { client, pulse };
    const since = performance.now();
    this.open.add(connection);
    this.metrics.openWebSockets.inc();
    this.beats.start();

    webSocket.on('ping', (payload) => {
      pulse.hear();
      client.output.answerPing(payload);
    });
    webSocket.on('error', (error) => {
      this.logger.debug({ request_id: requestId, err: error });
      client.leave();
    });
    webSocket.on('close', (code) => {
      this.remove(connection);
      const line = {
        request_id: requestId,
        path: WEBSOCKET_PATH,
        code,
        ms: Math.round(performance.now() - since),
      };
      this.logger.log(line, 'WebSocket closed');
    });
    return client;
  }

  private connect(webSocket: WebSocket, socket: Socket, requestId: string): ClientConnection {
    const client = new ClientConnection({
      webSocket,
      socket,
      requestId,
      metrics: this.metrics,
      limits: {
        mostSubscriptions: this.config.WS_MAX_SUBSCRIPTIONS,
        json: jsonLimits(this.config),
      },
    });
    webSocket.on('message', (data: Buffer, isBinary: boolean) => {
      if (isBinary) client.close(1003, 'Send text, not binary messages.');
      else client.receive(data.toString('utf8'));
    });
    // It says nothing more. Where it does not read either, the rest would wait for ever.
    socket.once('end', () => {
      client.leave();
      const timer = setTimeout(() => socket.destroy(), DRAIN_MS);
      socket.once('close', () => clearTimeout(timer));
    });
    return client;
  }

  private remove(connection: OpenConnection): void {
    connection.client.leave();
    this.open.delete(connection);
    this.metrics.openWebSockets.dec();
  }

  /** What came while the process was held up is read before anybody is judged. */
  private async beat(): Promise<false | void> {
    await nextTurn();
    this.open.forEach(({ pulse }) => pulse.beat());
    if (this.open.size === 0) return false;
  }
}

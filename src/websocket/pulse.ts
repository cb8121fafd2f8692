import type { Socket } from 'node:net';
import type { WebSocket } from 'ws';

/** A peer may be as slow as this from the beginning: what was sent before a ping delays its answer, bytes a second. */
const SLOWEST = 256;
/** A peer may become so many times slower than it was at its last answer. */
const SLOWER = 16;

interface Ping {
  at: number;
  /** Bytes that were sent up to this ping. */
  sent: number;
  /** How many of them may be on the way still. */
  ahead: number;
}

/**
 * Looks whether the peer of a WebSocket lives. One that is merely slow does: its answer to a ping comes after everything
 * that was sent before it, and while the socket is full a ping does not even get out. TCP finds out whether such a peer is dead.
 */
export class Pulse {
  private awaited: Ping | undefined;
  private heardAt = performance.now();
  /** Bytes that the peer has read for sure. */
  private arrived = 0;
  /** Bytes a second: as slow as it may become, after the pace that it last had. */
  private slowest = SLOWEST;

  constructor(
    private readonly webSocket: WebSocket,
    private readonly socket: Socket,
    private readonly intervalMs: number,
  ) {
    webSocket.on('message', () => this.hear());
    webSocket.on('pong', () => {
      this.hear();
      if (this.awaited) this.answered(this.awaited);
      this.awaited = undefined;
    });
  }

  private answered({ at, sent, ahead }: Ping): void {
    this.arrived = sent;
    const seconds = Math.max(1, performance.now() - at) / 1000;
    this.slowest = Math.max(SLOWEST, ahead / seconds / SLOWER);
  }

  /** The peer said something. */
  hear(): void {
    this.heardAt = performance.now();
  }

  /** To be called at each interval: sends a ping, or ends the connection if the last one was not answered in time. */
  beat(): void {
    if (this.socket.writableNeedDrain || this.webSocket.isPaused) return;
    const now = performance.now();
    if (!this.awaited) {
      const sent = this.socket.bytesWritten;
      this.awaited = { at: now, sent, ahead: sent - this.arrived };
      this.webSocket.ping();
      return;
    }
    const silence = now - Math.max(this.awaited.at, this.heardAt);
    const patience = this.intervalMs / 2 + (this.awaited.ahead / this.slowest) * 1000;
    if (silence > patience) this.webSocket.terminate();
  }
}

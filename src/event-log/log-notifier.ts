import { randomUUID } from 'node:crypto';
import { Injectable, Logger } from '@nestjs/common';
import type { OnApplicationShutdown, OnModuleInit } from '@nestjs/common';
import { Pool } from 'pg';
import { Notifications } from '../database/notifications.js';
import { Repeat } from '../repeat.js';
import { LogSubscriptions } from './log-subscriptions.js';
import { POSITIONS } from './statements.js';

const CHANNEL = 'agent_studio_log';
/** PostgreSQL refuses a payload of 8,000 bytes; a position takes 36 (UUID) + 1 + 10 + 1 at most. */
const POSITIONS_PER_PAYLOAD = 160;
/** How often a process says that it is there, and asks the table in case a notification was lost. */
const BEAT_MS = 2000;
/** A process that was silent for this long is taken for gone. */
const PEER_SILENCE_MS = 3 * BEAT_MS;
/** Processes that are known at once. There are never so many: it bounds what others who may send notifications can do. */
const MOST_PEERS = 1000;
/** Positions that wait for a connection which does not take them. The poll of those who read finds what is beyond. */
const MOST_UNSENT = 20_000;
/** Logs that one statement of the poll asks for. */
const POLLED_AT_ONCE = 1000;

/** A process's id, and positions as they are written here: anything else is not from us, and says nothing. */
const SENDER = /^[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}$/;
const POSITION = /^(?<executionId>[\da-f-]{36}):(?<last>[1-9]\d{0,8})$/;

export interface LogPosition {
  executionId: string;
  last: number;
}

/**
 * Wakes readers in other processes: NOTIFY carries positions only (`<process> <execution>:<last>,…`), the chunks stay
 * in the table. Processes greet each other (a payload without positions), so that one that is alone on its database
 * notifies nobody. Notifications may be lost (a reconnect, a process that has not been heard yet); a slow poll and a
 * fresh look at the table after each reconnect make up for that.
 */
@Injectable()
export class LogNotifier implements OnModuleInit, OnApplicationShutdown {
  private readonly logger = new Logger(LogNotifier.name);
  private readonly self = randomUUID();
  private readonly peers = new Map<string, number>();
  private readonly unsent = new Map<string, number>();
  private mustGreet = false;
  private sending: Promise<void> | undefined;
  private readonly beats = new Repeat((signal) => this.onBeat(signal), {
    everyMs: BEAT_MS,
    onError: (error) => this.logger.warn(error),
  });

  constructor(
    private readonly notifications: Notifications,
    private readonly pool: Pool,
    private readonly subscriptions: LogSubscriptions,
  ) {
    notifications.listen(CHANNEL, {
      onNotification: (payload) => this.receive(payload),
      onConnect: () => this.subscriptions.invalidateAll(),
    });
  }

  async onModuleInit(): Promise<void> {
    await this.greet().catch((error: unknown) => this.logger.warn(error)); // the next beat greets again
    this.beats.start();
  }

  onApplicationShutdown(): void {
    void this.beats.stop();
  }

  /** Tells the other processes, if there are any, how far some logs go. It does not wait, and a failure is made up for. */
  announce(positions: LogPosition[]): void {
    if (positions.length === 0 || !this.hasPeers()) return;
    for (const { executionId, last } of positions) {
      if (this.unsent.size < MOST_UNSENT || this.unsent.has(executionId)) this.unsent.set(executionId, last);
    }
    this.send().catch((error: unknown) => this.logger.debug(error));
  }

  private greet(): Promise<void> {
    this.mustGreet = true;
    return this.send();
  }

  /** One statement at a time: what comes meanwhile goes into the next one. */
  private send(): Promise<void> {
    this.sending ??= this.sendAll().finally(() => (this.sending = undefined));
    return this.sending;
  }

  private async sendAll(): Promise<void> {
    while (this.mustGreet || this.unsent.size > 0) {
      const payloads = this.mustGreet ? [''] : [];
      const positions = [...this.unsent].map(([executionId, last]) => `${executionId}:${last}`);
      for (let start = 0; start < positions.length; start += POSITIONS_PER_PAYLOAD) {
        payloads.push(positions.slice(start, start + POSITIONS_PER_PAYLOAD).join());
      }
      this.mustGreet = false;
      this.unsent.clear();
      await this.notifications.send(
        CHANNEL,
        payloads.map((payload) => `${this.self} ${payload}`),
      );
    }
  }

  private receive(payload: string): void {
    const [sender = '', positions = ''] = payload.split(' ');
    if (sender === this.self || !SENDER.test(sender)) return;
    const isNew = !this.peers.has(sender);
    if (isNew && this.peers.size >= MOST_PEERS) return;
    this.peers.set(sender, Date.now());
    // So that a newcomer does not have to wait for the next beat to learn that it is not alone.
    if (isNew) this.greet().catch((error: unknown) => this.logger.debug(error));
    for (const position of positions.split(',')) {
      const { executionId, last } = POSITION.exec(position)?.groups ?? {};
      if (executionId) this.subscriptions.announce(executionId, Number(last));
    }
  }

  private hasPeers(): boolean {
    this.forgetSilent();
    return this.peers.size > 0;
  }

  private forgetSilent(): void {
    const oldest = Date.now() - PEER_SILENCE_MS;
    for (const [peer, heard] of this.peers) if (heard < oldest) this.peers.delete(peer);
  }

  private async onBeat(signal: AbortSignal): Promise<void> {
    this.forgetSilent(); // also where nothing is ever announced
    await this.greet().catch((error: unknown) => this.logger.warn(error));
    const executionIds = this.subscriptions.executionIds();
    for (let start = 0; start < executionIds.length && !signal.aborted; start += POLLED_AT_ONCE) {
      await this.poll(executionIds.slice(start, start + POLLED_AT_ONCE));
    }
  }

  /** Asks how far some logs go, as if it had been announced. */
  private async poll(executionIds: string[]): Promise<void> {
    const { rows } = await this.pool.query<{ execution_id: string; last_sequence: number }>({
      ...POSITIONS,
      values: [executionIds],
    });
    rows.forEach((row) => this.subscriptions.announce(row.execution_id, row.last_sequence));
    const found = new Set(rows.map((row) => row.execution_id));
    // Each log has had a chunk since its acceptance, so this one was deleted. Who reads it would wait for ever.
    for (const executionId of executionIds)
      if (!found.has(executionId)) this.subscriptions.close(executionId);
  }
}

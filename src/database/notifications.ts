import { Inject, Injectable, Logger } from '@nestjs/common';
import type { OnApplicationShutdown, OnModuleInit } from '@nestjs/common';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { GroupCommit } from './group-commit.js';
import { NotificationQueue } from './notification-queue.js';
import { SessionConnection } from './session-connection.js';
import { isNotificationQueueFull, retryWhileUnavailable } from './unavailable.js';

/** Notifications that wait for a connection which does not take them, or for PostgreSQL to answer. */
const MOST_WAITING = 10_000;

const SEND = {
  name: 'notifications-send',
  text: 'SELECT pg_notify(channel, payload) FROM unnest($1::text[], $2::text[]) AS sent (channel, payload)',
};

/** What a part of the server does about notifications on its channel. */
export interface NotificationHandler {
  onNotification: (payload: string) => void;
  /** Called with each new connection: what was sent while there was none is lost. */
  onConnect?: () => void;
}

interface Notification {
  channel: string;
  payload: string;
}

/**
 * LISTEN and NOTIFY for the whole process, on one connection that is made again as soon as it is lost. Notifications can
 * get lost with it, so they are wake-ups only: what they are about stands in tables.
 */
@Injectable()
export class Notifications implements OnModuleInit, OnApplicationShutdown {
  private readonly logger = new Logger(Notifications.name);
  private readonly handlers = new Map<string, NotificationHandler>();
  private readonly shutdown = new AbortController();
  /** A connection takes one statement at a time: what comes meanwhile goes into the next one, all of it. */
  private readonly sends = new GroupCommit<Notification, void>((sent) => this.notify(sent), {
    mostItems: MOST_WAITING,
  });
  private waiting = 0;
  private readonly session: SessionConnection;
  // A notification takes a lock of the whole database until its commit, which must not wait for the disk.
  private readonly setup = ['SET synchronous_commit = off'];

  constructor(
    @Inject(CONFIG) config: ServerConfig,
    private readonly queue: NotificationQueue,
  ) {
    this.session = new SessionConnection({
      connectionString: config.DATABASE_URL,
      kind: 'notifications',
      setup: this.setup,
      onConnect: (client) => {
        client.on('notification', ({ channel, payload = '' }) =>
          this.handlers.get(channel)?.onNotification(payload),
        );
        this.handlers.forEach((handler) => handler.onConnect?.());
      },
      onLost: (error) => {
        this.logger.warn(`The connection that listens for notifications was lost: ${error.message}`);
        // Rejects when the process shuts down, and for a defect, which the next notification that is sent meets too.
        this.connect().catch((failure: unknown) => this.logger.debug(failure));
      },
    });
  }

  async onModuleInit(): Promise<void> {
    await this.connect();
  }

  async onApplicationShutdown(): Promise<void> {
    this.shutdown.abort(new Error('The notifications are closed.'));
    await this.session.close();
  }

  /** Hears what is sent on `channel`, by this process too. To be called in a constructor, before there is a connection. */
  listen(channel: string, handler: NotificationHandler): void {
    this.handlers.set(channel, handler);
    this.setup.push(`LISTEN ${channel}`);
  }

  /** Sends payloads of less than 8,000 bytes each. Rejects as pg does, and at once if too many wait already. */
  async send(channel: string, payloads: string[]): Promise<void> {
    if (this.waiting + payloads.length > MOST_WAITING)
      throw new Error(`${this.waiting} notifications wait already: these are not sent.`);
    this.waiting += payloads.length;
    await Promise.all(
      payloads.map((payload) => this.sends.add({ channel, payload }).finally(() => this.waiting--)),
    );
  }

  private async notify(sent: Notification[]): Promise<void[]> {
    const values = [sent.map(({ channel }) => channel), sent.map(({ payload }) => payload)];
    try {
      await this.session.query({ ...SEND, values });
    } catch (error) {
      if (isNotificationQueueFull(error)) this.queue.refused();
      throw error;
    }
    return sent.map(() => undefined);
  }

  private async connect(): Promise<void> {
    await retryWhileUnavailable(() => this.session.connected(), {
      signal: this.shutdown.signal,
      onRetry: (error) => this.logger.debug(error),
    });
  }
}

import { Inject, Injectable, Logger } from '@nestjs/common';
import type { OnApplicationBootstrap, OnModuleDestroy } from '@nestjs/common';
import { Pool } from 'pg';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { Metrics } from '../metrics.js';
import { Repeat } from '../repeat.js';
import { isUnavailable } from './unavailable.js';

/** From this usage on nothing is relied upon to get in: what is notified takes a page or more. */
const FULL = 0.99;

const USAGE = { name: 'notification-queue-usage', text: 'SELECT pg_notification_queue_usage() AS usage' };

type Level = 'low' | 'high' | 'full';
const LEVELS: Level[] = ['low', 'high', 'full'];

/**
 * Watches the queue in which PostgreSQL keeps notifications until every listener of the whole server has taken them. One that
 * takes none fills it, and then every transaction that notifies fails, so that nothing is handed to workers any more.
 */
@Injectable()
export class NotificationQueue implements OnApplicationBootstrap, OnModuleDestroy {
  private readonly logger = new Logger(NotificationQueue.name);
  private level: Level = 'low';
  private readonly looks: Repeat;

  constructor(
    @Inject(CONFIG) private readonly config: ServerConfig,
    private readonly pool: Pool,
    private readonly metrics: Metrics,
  ) {
    this.looks = new Repeat(async () => void (await this.measure()), {
      everyMs: config.NOTIFICATION_QUEUE_WATCH_MS,
      onError: (error) => this.logger[isUnavailable(error) ? 'debug' : 'warn'](error),
    });
  }

  onApplicationBootstrap(): void {
    this.looks.start();
  }

  onModuleDestroy(): void {
    void this.looks.stop();
  }

  /** Whether nothing more gets into it, as far as is known. */
  get isFull(): boolean {
    return this.level === 'full';
  }

  /** How full the queue is now, from 0 to 1. Rejects as pg does. */
  async measure(): Promise<number> {
    const { rows } = await this.pool.query<{ usage: number }>(USAGE);
    const usage = rows[0]?.usage ?? 0;
    this.take(usage);
    return usage;
  }

  /** PostgreSQL has refused a notification since the queue is full. */
  refused(): void {
    this.take(1);
    this.looks.start(0);
  }

  private take(usage: number): void {
    this.metrics.notificationQueueUsage.set(usage);
    const before = this.level;
    this.level = this.levelOf(usage);
    const rise = LEVELS.indexOf(this.level) - LEVELS.indexOf(before);
    if (rise > 0) this.warn(usage);
    else if (this.level === 'low' && before !== 'low')
      this.logger.log(`PostgreSQL's queue of notifications is ${percent(usage)} full again.`);
  }

  private levelOf(usage: number): Level {
    if (usage >= FULL) return 'full';
    return usage * 100 >= this.config.NOTIFICATION_QUEUE_WARN_PERCENT ? 'high' : 'low';
  }

  private warn(usage: number): void {
    const consequence = this.isFull
      ? 'nothing runs until there is room'
      : 'once it is full, nothing runs any more';
    this.logger.warn(
      `PostgreSQL's queue of notifications is ${percent(usage)} full: ${consequence}. A session that listens, in ` +
        "any database of the server, takes nothing out; PostgreSQL's log names the oldest transaction.",
    );
  }
}

function percent(usage: number): string {
  return `${Math.round(usage * 100)} %`;
}

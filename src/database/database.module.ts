import { Global, Inject, Logger, Module } from '@nestjs/common';
import type { OnApplicationShutdown } from '@nestjs/common';
import { TypeOrmModule } from '@nestjs/typeorm';
import { Pool } from 'pg';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { createDataSource, migrate } from './data-source.js';
import { SlowPool } from './slow-pool.js';
import { NotificationQueue } from './notification-queue.js';
import { Notifications } from './notifications.js';
import { sessionConfig } from './session.js';

/** TypeORM for the resources, and a plain `pg` pool for the prepared statements of the hot path. */
@Global()
@Module({
  imports: [
    TypeOrmModule.forRootAsync({
      inject: [CONFIG],
      useFactory: async ({ DATABASE_URL: url, DATABASE_TIMEOUT_MS: timeoutMs }: ServerConfig) => {
        await migrate(url);
        return { ...createDataSource({ url, timeoutMs }).options, retryAttempts: 1 };
      },
    }),
  ],
  providers: [
    NotificationQueue,
    Notifications,
    SlowPool,
    {
      provide: Pool,
      inject: [CONFIG],
      useFactory: (config: ServerConfig) =>
        new Pool({
          ...sessionConfig(config.DATABASE_URL, { statementMs: config.DATABASE_TIMEOUT_MS }),
          max: config.DATABASE_POOL_SIZE,
        }),
    },
  ],
  exports: [NotificationQueue, Notifications, Pool, SlowPool],
})
export class DatabaseModule implements OnApplicationShutdown {
  private readonly logger = new Logger(DatabaseModule.name);

  constructor(@Inject(Pool) private readonly pool: Pool) {
    // Without a listener, an idle connection that the server closes would end the process.
    pool.on('error', (error) => this.logger.warn(`An idle database connection was lost: ${error.message}`));
  }

  async onApplicationShutdown(): Promise<void> {
    await this.pool.end();
  }
}

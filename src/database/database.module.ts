import { Global, Inject, Logger, Module } from '@nestjs/common';
import type { OnApplicationShutdown } from '@nestjs/common';
import { TypeOrmModule } from '@nestjs/typeorm';
import { Pool } from 'pg';
import { DataSource } from 'typeorm';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { CONNECT_TIMEOUT_MS, createDataSource, migrate } from './data-source.js';
import { timeLimits } from './strict-client.js';
import { Notifications } from './notifications.js';

/** TypeORM for the resources, and a plain `pg` pool for the prepared statements of the hot path. */
@Global()
@Module({
  imports: [
    TypeOrmModule.forRootAsync({
      inject: [CONFIG],
      useFactory: (config: ServerConfig) => ({
        ...createDataSource({ url: config.DATABASE_URL, timeoutMs: config.DATABASE_TIMEOUT_MS }).options,
        retryAttempts: 1,
      }),
      dataSourceFactory: async (options) => {
        if (options?.type !== 'postgres' || !options.url)
          throw new Error('The data source must be PostgreSQL.');
        await migrate(options.url);
        return new DataSource(options).initialize();
      },
    }),
  ],
  providers: [
    Notifications,
    {
      provide: Pool,
      inject: [CONFIG],
      useFactory: (config: ServerConfig) =>
        new Pool({
          connectionString: config.DATABASE_URL,
          max: config.DATABASE_POOL_SIZE,
          connectionTimeoutMillis: CONNECT_TIMEOUT_MS,
          ...timeLimits(config.DATABASE_TIMEOUT_MS),
          keepAlive: true,
          application_name: 'agent-studio',
        }),
    },
  ],
  exports: [Notifications, Pool],
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

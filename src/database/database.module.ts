import { Global, Inject, Logger, Module } from '@nestjs/common';
import type { OnApplicationShutdown } from '@nestjs/common';
import { TypeOrmModule } from '@nestjs/typeorm';
import { Pool } from 'pg';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { CONNECT_TIMEOUT_MS, createDataSource, migrate } from './data-source.js';

/** TypeORM for the resources, and a plain `pg` pool for the prepared statements of the hot path. */
@Global()
@Module({
  imports: [
    TypeOrmModule.forRootAsync({
      inject: [CONFIG],
      useFactory: (config: ServerConfig) => ({
        ...createDataSource({ url: config.DATABASE_URL }).options,
        retryAttempts: 1,
      }),
      dataSourceFactory: async (options) => {
        if (options?.type !== 'postgres' || !options.url)
          throw new Error('The data source must be PostgreSQL.');
        const dataSource = await createDataSource({ url: options.url }).initialize();
        await migrate(dataSource, options.url);
        return dataSource;
      },
    }),
  ],
  providers: [
    {
      provide: Pool,
      inject: [CONFIG],
      useFactory: (config: ServerConfig) =>
        new Pool({
          connectionString: config.DATABASE_URL,
          max: config.DATABASE_POOL_SIZE,
          connectionTimeoutMillis: CONNECT_TIMEOUT_MS,
          application_name: 'agent-studio',
        }),
    },
  ],
  exports: [Pool],
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

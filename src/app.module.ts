import { Global, Module } from '@nestjs/common';
import type { DynamicModule } from '@nestjs/common';
import { BatchesModule } from './batches/batches.module.js';
import { CONFIG } from './config.js';
import type { ServerConfig } from './config.js';
import { DatabaseModule } from './database/database.module.js';
import { DeploymentsModule } from './deployments/deployments.module.js';
import { ExecutionsModule } from './executions/executions.module.js';
import { HealthModule } from './health/health.module.js';
import { Metrics } from './metrics.js';
import { WebSocketModule } from './websocket/websocket.module.js';
import { WorkflowsModule } from './workflows/workflows.module.js';

@Global()
@Module({})
export class AppModule {
  /** The whole server with the given configuration. */
  static forRoot(config: ServerConfig): DynamicModule {
    return {
      module: AppModule,
      imports: [
        DatabaseModule,
        WorkflowsModule,
        DeploymentsModule,
        ExecutionsModule,
        BatchesModule,
        WebSocketModule,
        HealthModule,
      ],
      providers: [{ provide: CONFIG, useValue: config }, Metrics],
      exports: [CONFIG, Metrics],
    };
  }
}

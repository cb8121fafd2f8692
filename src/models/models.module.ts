import { Module } from '@nestjs/common';
import type { OnApplicationShutdown } from '@nestjs/common';
import { CONFIG } from '../config.js';
import type { Config } from '../config.js';
import { AiSdkModelRegistry } from './ai-sdk.registry.js';
import { ModelRegistry } from './model-registry.js';

/** Provides the {@link ModelRegistry} of the configured providers. */
@Module({
  providers: [
    {
      provide: AiSdkModelRegistry,
      useFactory: (config: Config) => new AiSdkModelRegistry(config),
      inject: [CONFIG],
    },
    { provide: ModelRegistry, useExisting: AiSdkModelRegistry },
  ],
  exports: [ModelRegistry],
})
export class ModelsModule implements OnApplicationShutdown {
  constructor(private readonly registry: AiSdkModelRegistry) {}

  async onApplicationShutdown(): Promise<void> {
    await this.registry.close();
  }
}

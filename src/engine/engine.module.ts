import { getHeapStatistics } from 'node:v8';
import { Logger, Module, type OnApplicationShutdown } from '@nestjs/common';
import { CONFIG, type Config } from '../config.js';
import { Metrics } from '../metrics.js';
import { EvaluationPool } from './evaluation-pool.js';
import { Evaluator } from './evaluation.js';
import { OutputMemory } from './output-memory.js';

/** Provides the {@link OutputMemory} and the {@link Evaluator}, and ends its threads when everything that runs has ended. */
@Module({
  providers: [
    {
      provide: EvaluationPool,
      useFactory: (config: Config, metrics: Metrics) => {
        const logger = new Logger(EvaluationPool.name);
        return new EvaluationPool({
          threads: config.EVALUATION_THREADS,
          budget_ms: config.EVALUATION_BUDGET_MS,
          metrics,
          onDefect: (error) => logger.error(error),
        });
      },
      inject: [CONFIG, Metrics],
    },
    { provide: Evaluator, useExisting: EvaluationPool },
    {
      provide: OutputMemory,
      useFactory: ({ MAX_PROCESS_OUTPUT_PERCENT: percent, WORKER_CONCURRENCY }: Config) =>
        new OutputMemory((getHeapStatistics().heap_size_limit * percent) / 100, WORKER_CONCURRENCY),
      inject: [CONFIG],
    },
  ],
  exports: [Evaluator, OutputMemory],
})
export class EngineModule implements OnApplicationShutdown {
  constructor(private readonly pool: EvaluationPool) {}

  async onApplicationShutdown(): Promise<void> {
    await this.pool.close();
  }
}

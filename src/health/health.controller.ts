import { Controller, Get, Header } from '@nestjs/common';
import { ApiExcludeEndpoint, ApiTags } from '@nestjs/swagger';
import { HealthCheck, HealthCheckService, HealthIndicatorService } from '@nestjs/terminus';
import type { HealthCheckResult, HealthIndicatorResult } from '@nestjs/terminus';
import { Pool } from 'pg';
import { Metrics } from '../metrics.js';
import { ExecutionQueue } from '../queue/execution-queue.js';

/** ms after which a part that does not answer counts as down. */
const PROBE_TIMEOUT_MS = 2000;

@ApiTags('operations')
@Controller()
export class HealthController {
  constructor(
    private readonly health: HealthCheckService,
    private readonly indicators: HealthIndicatorService,
    private readonly pool: Pool,
    private readonly queue: ExecutionQueue,
    private readonly metrics: Metrics,
  ) {}

  /** Whether the process runs; a failure means: restart it */
  @Get('health/live')
  live(): { status: 'ok' } {
    return { status: 'ok' };
  }

  /** Whether the process can take requests now; a failure means: send them elsewhere */
  @Get('health/ready')
  @HealthCheck()
  ready(): Promise<HealthCheckResult> {
    return this.health.check([
      () => this.probe('database', () => this.pool.query('SELECT 1')),
      () => this.probe('queue', () => this.queue.depth()),
    ]);
  }

  @Get('metrics')
  @ApiExcludeEndpoint()
  @Header('Content-Type', 'text/plain; version=0.0.4; charset=utf-8')
  async scrape(): Promise<string> {
    this.metrics.queueDepth.set(await this.queue.depth());
    return this.metrics.registry.metrics();
  }

  private probe(name: string, ask: () => Promise<unknown>): PromiseLike<HealthIndicatorResult> {
    const attempt = this.indicators.check(name).attempt(async () => void (await ask()));
    return attempt.withTimeout(PROBE_TIMEOUT_MS);
  }
}

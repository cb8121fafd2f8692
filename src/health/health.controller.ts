import { Controller, Get, Header, HttpException } from '@nestjs/common';
import type { OnModuleDestroy } from '@nestjs/common';
import { ApiExcludeEndpoint, ApiTags } from '@nestjs/swagger';
import { HealthCheck, HealthCheckService, HealthIndicatorService } from '@nestjs/terminus';
import type { HealthCheckResult, HealthIndicatorResult } from '@nestjs/terminus';
import { NotificationQueue } from '../database/notification-queue.js';
import { OutputMemory } from '../engine/output-memory.js';
import { AppError } from '../errors.js';
import { Metrics } from '../metrics.js';
import { ExecutionQueue } from '../queue/execution-queue.js';

/** ms after which a part that does not answer counts as down. */
const PROBE_TIMEOUT_MS = 2000;

@ApiTags('operations')
@Controller()
export class HealthController implements OnModuleDestroy {
  private isClosing = false;

  constructor(
    private readonly health: HealthCheckService,
    private readonly indicators: HealthIndicatorService,
    private readonly notifications: NotificationQueue,
    private readonly queue: ExecutionQueue,
    private readonly memory: OutputMemory,
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
  async ready(): Promise<HealthCheckResult> {
    if (this.isClosing) throw new AppError('unavailable', 'The server is shutting down.', { retryAfter: 1 });
    const parts = [
      () =>
        this.probe('database', async () => ({
          notification_queue_usage: await this.notifications.measure(),
        })),
      () => this.probe('queue', async () => void (await this.queue.size())),
    ];
    const result = await this.health.check(parts).catch((error: unknown) => {
      throw notReady(`${nameParts(error)} can not be reached`);
    });
    if (!this.notifications.isFull) return result;
    throw notReady(
      "PostgreSQL's queue of notifications is full, so that nothing can run (see operations.md)",
    );
  }

  /** From here on, new requests should go elsewhere, while what runs here is given time to end. */
  onModuleDestroy(): void {
    this.isClosing = true;
  }

  @Get('metrics')
  @ApiExcludeEndpoint()
  @Header('Content-Type', 'text/plain; version=0.0.4; charset=utf-8')
  async scrape(): Promise<string> {
    // The other figures are wanted most when the queue can't be reached.
    const size = await this.queue.size().catch(() => undefined);
    this.metrics.queueDepth.set(size?.waiting ?? NaN);
    this.metrics.heldOutput.set(this.memory.held);
    return this.metrics.registry.metrics();
  }

  private probe(
    name: string,
    ask: () => Promise<Record<string, unknown> | void>,
  ): PromiseLike<HealthIndicatorResult> {
    return this.indicators.check(name).attempt(ask).withTimeout(PROBE_TIMEOUT_MS);
  }
}

function notReady(reason: string): AppError {
  return new AppError('unavailable', `Not ready: ${reason}.`, { retryAfter: 1 });
}

function nameParts(error: unknown): string {
  if (!(error instanceof HttpException)) throw error;
  const { error: down } = error.getResponse() as HealthCheckResult;
  return Object.keys(down ?? {}).join(' and ');
}

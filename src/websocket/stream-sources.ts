import { Inject, Injectable, Logger } from '@nestjs/common';
import { BatchesReader } from '../batches/batches.reader.js';
import { CONFIG } from '../config.js';
import type { ServerConfig } from '../config.js';
import { retryWhileUnavailable } from '../database/unavailable.js';
import { DeploymentsService } from '../deployments/deployments.service.js';
import { EventLog } from '../event-log/event-log.js';
import { MergedLog } from '../event-log/merged-log.js';
import { ExecutionsReader } from '../executions/executions.reader.js';
import type { StreamStart } from '../executions/executions.reader.js';
import type { StatusChange, StatusFilter, StatusSnapshot } from '../status-events/status-event.js';
import { StatusEvents } from '../status-events/status-events.js';
import type { StreamBatch, StreamSource } from './subscription.js';
import type { SubscribeDto } from './websocket.dto.js';

/** A stream that was found, and where it begins. */
export interface OpenedSource {
  source: StreamSource;
  after: number | undefined;
  /** Nothing comes after `after`. */
  ended: boolean;
}

/** Finds what clients want to follow. */
@Injectable()
export class StreamSources {
  private readonly logger = new Logger(StreamSources.name);

  constructor(
    private readonly log: EventLog,
    private readonly reader: ExecutionsReader,
    private readonly mergedLog: MergedLog,
    private readonly batches: BatchesReader,
    private readonly deployments: DeploymentsService,
    private readonly statuses: StatusEvents,
    @Inject(CONFIG) private readonly config: ServerConfig,
  ) {}

  /** The chunks of an execution. */
  execution(executionId: string): StreamSource {
    return {
      event: 'chunk',
      name: { execution_id: executionId },
      intervalMs: this.config.STREAM_FLUSH_INTERVAL_MS,
      read: (after = 0, options) => this.log.read(executionId, after, options),
      isOver: (after, signal) => this.isOver(() => this.reader.streamStart(executionId, { after }), signal),
    };
  }

  /** Rejects with `execution_not_found`, `invalid_cursor` or `log_expired`. */
  async openExecution(executionId: string, from: number | undefined): Promise<OpenedSource> {
    const { after, ended } = await this.reader.streamStart(executionId, { after: from });
    return { source: this.execution(executionId.toLowerCase()), after, ended };
  }

  /** The chunks of all items of a batch as one stream. Rejects with `batch_not_found`, `invalid_cursor` or `log_expired`. */
  async openBatch(batchId: string, from: number | undefined): Promise<OpenedSource> {
    const { after, ended } = await this.batches.streamStart(batchId, { after: from });
    const source: StreamSource = {
      event: 'chunk',
      name: { batch_id: batchId },
      intervalMs: 0, // the merged log keeps the pace itself while it grows; what is behind that is a lot, and need not wait
      read: (position = 0, options) => this.mergedLog.read(batchId, position, options),
      isOver: (position, signal) =>
        this.isOver(() => this.batches.streamStart(batchId, { after: position }), signal),
    };
    return { source, after, ended };
  }

  /** The status of a deployment and of its executions, which has no end. Rejects with `deployment_not_found`. */
  async openDeployment(
    deploymentName: string,
    { environment, status, after }: SubscribeDto,
  ): Promise<OpenedSource> {
    const found = await this.deployments.find(deploymentName, environment);
    const filter = {
      deployment_name: deploymentName,
      environment: found.environment,
      status,
      deployments: true,
    };
    const source: StreamSource = {
      event: 'status',
      name: { deployment_name: deploymentName, environment: found.environment },
      intervalMs: 0,
      read: (from, options) => this.changes(filter, from, options),
      isOver: () => Promise.resolve(false),
    };
    return { source, after, ended: false };
  }

  private async isOver(start: () => Promise<StreamStart>, signal: AbortSignal): Promise<boolean> {
    return (await this.retried(start, signal)).ended;
  }

  /** A stream that is followed stays, while the database is away. */
  private retried<Result>(work: () => Promise<Result>, signal: AbortSignal): Promise<Result> {
    return retryWhileUnavailable(work, { signal, onRetry: (error) => this.logger.debug(error) });
  }

  private async *changes(
    filter: StatusFilter,
    after: number | undefined,
    { signal, idleMs = this.config.HEARTBEAT_INTERVAL_MS }: { signal: AbortSignal; idleMs?: number },
  ): AsyncGenerator<StreamBatch, void, void> {
    const start = await this.retried(() => this.statuses.begin(filter, after), signal);
    if (typeof start !== 'number') yield batchOf([start]);
    const cursor = typeof start === 'number' ? start : start.sequence;
    for await (const changes of this.statuses.read(filter, cursor, { signal, idleMs }))
      yield batchOf(changes);
  }
}

function batchOf(events: (StatusChange | StatusSnapshot)[]): StreamBatch {
  return {
    first: events[0]?.sequence ?? 0,
    positions: events.map(({ sequence }) => sequence),
    chunks: events.map((event) => JSON.stringify(event)),
    terminal: false,
  };
}

import { Module } from '@nestjs/common';
import { BatchesModule } from '../batches/batches.module.js';
import { DeploymentsModule } from '../deployments/deployments.module.js';
import { EventLogModule } from '../event-log/event-log.module.js';
import { ExecutionsModule } from '../executions/executions.module.js';
import { StatusEventsModule } from '../status-events/status-events.module.js';
import { Connections } from './connections.js';
import { StreamSources } from './stream-sources.js';
import { StudioGateway } from './studio.gateway.js';

/** Everything that streams, over one WebSocket. */
@Module({
  imports: [BatchesModule, DeploymentsModule, EventLogModule, ExecutionsModule, StatusEventsModule],
  providers: [Connections, StreamSources, StudioGateway],
})
export class WebSocketModule {}

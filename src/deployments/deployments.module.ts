import { Module } from '@nestjs/common';
import { StatusEventsModule } from '../status-events/status-events.module.js';
import { WorkflowsModule } from '../workflows/workflows.module.js';
import { DeploymentsController } from './deployments.controller.js';
import { DeploymentsService } from './deployments.service.js';
import { ExampleSeed } from './example.seed.js';
import { RollUps } from './roll-ups.js';
import { StatisticsService } from './statistics.service.js';

/** Workflows made executable, and how their executions went. */
@Module({
  imports: [StatusEventsModule, WorkflowsModule],
  controllers: [DeploymentsController],
  providers: [DeploymentsService, StatisticsService, RollUps, ExampleSeed],
  exports: [DeploymentsService],
})
export class DeploymentsModule {}

import { Module } from '@nestjs/common';
import { TypeOrmModule } from '@nestjs/typeorm';
import { Execution } from '../database/entities/execution.entity.js';
import { Step } from '../database/entities/step.entity.js';
import { DeploymentsModule } from '../deployments/deployments.module.js';
import { EngineModule } from '../engine/engine.module.js';
import { EventLogModule } from '../event-log/event-log.module.js';
import { ModelsModule } from '../models/models.module.js';
import { QueueModule } from '../queue/queue.module.js';
import { ExecutionsAcceptance } from './executions.acceptance.js';
import { ExecutionsAdmission } from './executions.admission.js';
import { StatusEventsModule } from '../status-events/status-events.module.js';
import { Claims } from './claims.js';
import { ExecutionEnds } from './ends.js';
import { ExecutionStreams } from './execution.stream.js';
import { ExecuteController, ExecutionsController } from './executions.controller.js';
import { ExecutionsList } from './executions.list.js';
import { ExecutionsReader } from './executions.reader.js';
import { ExecutionsService } from './executions.service.js';
import { ExecutionsSweep } from './executions.sweep.js';
import { ExecutionsWorker } from './executions.worker.js';
import { LostExecutions } from './lost-executions.js';
import { Retention } from './retention.js';
import { RunningExecutions } from './running-executions.js';
import { StepStore } from './step-store.js';
import { Subscribers } from './subscribers.js';
import { WorkerLeases } from './worker-leases.js';

@Module({
  imports: [
    TypeOrmModule.forFeature([Execution, Step]),
    DeploymentsModule,
    EngineModule,
    EventLogModule,
    ModelsModule,
    QueueModule,
    StatusEventsModule,
  ],
  controllers: [ExecuteController, ExecutionsController],
  providers: [
    Claims,
    ExecutionEnds,
    ExecutionStreams,
    ExecutionsAcceptance,
    ExecutionsAdmission,
    ExecutionsList,
    ExecutionsReader,
    ExecutionsService,
    ExecutionsSweep,
    ExecutionsWorker,
    LostExecutions,
    Retention,
    RunningExecutions,
    StepStore,
    Subscribers,
    WorkerLeases,
  ],
  exports: [
    ExecutionEnds,
    ExecutionsAcceptance,
    ExecutionsAdmission,
    ExecutionsReader,
    ExecutionsService,
    RunningExecutions,
    Subscribers,
  ],
})
export class ExecutionsModule {}

import { Module } from '@nestjs/common';
import { EngineModule } from '../engine/engine.module.js';
import { ModelsModule } from '../models/models.module.js';
import { WorkflowsController } from './workflows.controller.js';
import { WorkflowsService } from './workflows.service.js';

/** The definitions that can be deployed. */
@Module({
  imports: [EngineModule, ModelsModule],
  controllers: [WorkflowsController],
  providers: [WorkflowsService],
  exports: [WorkflowsService],
})
export class WorkflowsModule {}

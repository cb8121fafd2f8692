import { Module } from '@nestjs/common';
import { TypeOrmModule } from '@nestjs/typeorm';
import { Batch } from '../database/entities/batch.entity.js';
import { Execution } from '../database/entities/execution.entity.js';
import { EventLogModule } from '../event-log/event-log.module.js';
import { ExecutionsModule } from '../executions/executions.module.js';
import { QueueModule } from '../queue/queue.module.js';
import { BatchProgress } from './batch-progress.js';
import { BatchStreams } from './batch.stream.js';
import { BatchesAcceptance } from './batches.acceptance.js';
import { BatchesController, ExecuteBatchController } from './batches.controller.js';
import { BatchesReader } from './batches.reader.js';
import { BatchesService } from './batches.service.js';

@Module({
  imports: [TypeOrmModule.forFeature([Batch, Execution]), EventLogModule, ExecutionsModule, QueueModule],
  controllers: [ExecuteBatchController, BatchesController],
  providers: [BatchProgress, BatchStreams, BatchesAcceptance, BatchesReader, BatchesService],
  exports: [BatchesReader, BatchesService],
})
export class BatchesModule {}

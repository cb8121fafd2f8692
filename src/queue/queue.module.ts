import { Module } from '@nestjs/common';
import { BullQueue } from './bull.queue.js';
import { ExecutionQueue } from './execution-queue.js';

@Module({
  providers: [{ provide: ExecutionQueue, useClass: BullQueue }],
  exports: [ExecutionQueue],
})
export class QueueModule {}

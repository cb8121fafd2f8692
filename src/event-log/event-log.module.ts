import { Module } from '@nestjs/common';
import { DatabaseModule } from '../database/database.module.js';
import { EventLog } from './event-log.js';
import { PostgresEventLog } from './postgres-event-log.js';

@Module({
  imports: [DatabaseModule],
  providers: [{ provide: EventLog, useClass: PostgresEventLog }],
  exports: [EventLog],
})
export class EventLogModule {}

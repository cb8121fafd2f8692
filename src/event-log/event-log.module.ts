import { Module } from '@nestjs/common';
import { DatabaseModule } from '../database/database.module.js';
import { EventLog } from './event-log.js';
import { LogNotifier } from './log-notifier.js';
import { LogSubscriptions } from './log-subscriptions.js';
import { MergedLog } from './merged-log.js';
import { PostgresEventLog } from './postgres-event-log.js';
import { PostgresMergedLog } from './postgres-merged-log.js';

@Module({
  imports: [DatabaseModule],
  providers: [
    LogSubscriptions,
    LogNotifier,
    { provide: EventLog, useClass: PostgresEventLog },
    { provide: MergedLog, useClass: PostgresMergedLog },
  ],
  exports: [EventLog, MergedLog],
})
export class EventLogModule {}

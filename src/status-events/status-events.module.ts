import { Module } from '@nestjs/common';
import { StatusEvents } from './status-events.js';
import { StatusStreams } from './status.stream.js';

@Module({ providers: [StatusEvents, StatusStreams], exports: [StatusEvents, StatusStreams] })
export class StatusEventsModule {}

import { Entity, PrimaryColumn } from 'typeorm';

/**
 * How far the executions that ended before there were roll-ups are added to them: one row while that goes on, none after it
 * and in a new database.
 */
@Entity('statistics_backfill')
export class StatisticsBackfill {
  /** Executions with a smaller id are still to be looked at, the newest first. */
  @PrimaryColumn('uuid')
  below: string;
}

import { Column, Entity, PrimaryColumn } from 'typeorm';

/** The spans of time that executions are summed up for, in UTC. */
export const GRANULARITIES = ['minute', 'hour', 'day'] as const;
export type Granularity = (typeof GRANULARITIES)[number];

/** The executions of a deployment that ended in one minute, hour or day, summed up. It holds no text. */
@Entity('execution_statistics')
export class ExecutionStatistics {
  @PrimaryColumn('uuid')
  deployment_id: string;

  @PrimaryColumn('text')
  granularity: Granularity;

  @PrimaryColumn({ type: 'timestamptz', precision: 3 })
  bucket_start: Date;

  @Column('integer')
  execution_count: number;

  @Column('integer')
  success_count: number;

  @Column('integer')
  error_count: number;

  @Column('integer')
  cancelled_count: number;

  @Column('bigint')
  input_tokens: string;

  @Column('bigint')
  output_tokens: string;

  @Column({ type: 'timestamptz', precision: 3 })
  last_executed_at: Date;

  @Column({ type: 'timestamptz', precision: 3, nullable: true })
  last_error_at: Date | null;

  /** The bins of a histogram (deployments/histogram.ts) that hold anything, ascending: how long executions took that were not cancelled. */
  @Column('integer', { array: true })
  duration_bins: number[];

  /** How many executions each of these bins holds. */
  @Column('integer', { array: true })
  duration_counts: number[];

  /** The same of the time to the first text. */
  @Column('integer', { array: true })
  first_chunk_bins: number[];

  @Column('integer', { array: true })
  first_chunk_counts: number[];
}

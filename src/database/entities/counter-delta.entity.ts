import { Column, Entity, PrimaryColumn } from 'typeorm';
import type { TerminalStatus } from '../../executions/status.js';

/**
 * What the end of an execution adds to the counters and the statistics of its deployment, until a job has added it. A trigger
 * writes it in the transaction of the end, whichever statement that is, so an end waits for no row of a deployment.
 */
@Entity('counter_delta')
export class CounterDelta {
  @PrimaryColumn('uuid')
  deployment_id: string;

  @PrimaryColumn('uuid')
  execution_id: string;

  @Column('text')
  status: TerminalStatus;

  @Column({ type: 'timestamptz', precision: 3 })
  finished_at: Date;

  /** From acceptance to the end, in ms. */
  @Column('integer')
  duration_ms: number;

  /** From acceptance to the first text, in ms. */
  @Column('integer', { nullable: true })
  time_to_first_chunk_ms: number | null;

  @Column('bigint')
  input_tokens: string;

  @Column('bigint')
  output_tokens: string;

  /** True once it is added, and kept only so that the backfill of older executions passes over this one. */
  @Column('boolean', { default: false })
  folded: boolean;
}

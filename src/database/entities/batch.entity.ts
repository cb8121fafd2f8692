import { Column, Entity, Index, PrimaryColumn } from 'typeorm';
import { IS_RUNNING } from '../../executions/status.js';
import type { BatchStatus } from '../../executions/status.js';

/** Many executions of a deployment that were asked for at once: its items are the executions with its id. */
@Entity('batch')
@Index('batch_running', ['batch_id'], { where: `status ${IS_RUNNING}` })
@Index('batch_log_kept', ['finished_at'], { where: 'log_deleted_at IS NULL AND finished_at IS NOT NULL' })
export class Batch {
  /** A UUID of version 7. The batch's own log, of its first and its last chunk, is kept under it like an execution's. */
  @PrimaryColumn('uuid')
  batch_id: string;

  @Column('uuid')
  deployment_id: string;

  @Column('text')
  deployment_name: string;

  @Column('text')
  environment: string;

  @Column('uuid')
  workflow_id: string;

  /** SHA-256 of what was asked, in hexadecimal: tells a repeated request from another one. */
  @Column('text')
  request_hash: string;

  /** How many items are in the queue and running at once, at most. */
  @Column('integer')
  concurrency: number;

  /** After the first item that failed: begin the others all the same, or none of them. */
  @Column('text')
  on_item_error: 'continue' | 'stop';

  @Column('text')
  status: BatchStatus;

  @Column({ type: 'timestamptz', precision: 3 })
  created_at: Date;

  @Column({ type: 'timestamptz', precision: 3, nullable: true })
  finished_at: Date | null;

  @Column({ type: 'timestamptz', precision: 3, nullable: true })
  cancel_requested_at: Date | null;

  /** When retention deleted its merged log; those of its items follow. */
  @Column({ type: 'timestamptz', precision: 3, nullable: true })
  log_deleted_at: Date | null;

  /** How often the stored order of its merged log was cut. */
  @Column('integer', { default: 0 })
  order_cuts: number;
}

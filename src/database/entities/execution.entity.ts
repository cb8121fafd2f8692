import { Column, Entity, Index, PrimaryColumn } from 'typeorm';
import type { ExecutionInput } from './configuration.js';
import { IS_QUEUED, IS_UNFINISHED } from '../../executions/status.js';
import type { ExecutionStatus } from '../../executions/status.js';

/** One run of a deployment. It repeats the deployment's names, so that it stays readable after its deletion. */
@Entity('execution')
@Index('execution_deployment_finished', ['deployment_id', 'finished_at'])
@Index('execution_idempotency_key', ['idempotency_key'], {
  unique: true,
  where: 'idempotency_key IS NOT NULL',
})
@Index('execution_log_kept', ['finished_at'], { where: 'log_deleted_at IS NULL AND finished_at IS NOT NULL' })
@Index('execution_admitted', ['deployment_id'], { where: `admitted AND status ${IS_UNFINISHED}` })
@Index('execution_held_back', ['deployment_id', 'execution_id'], {
  where: `NOT admitted AND NOT held AND status ${IS_QUEUED}`,
})
@Index('execution_batch', ['batch_id', 'batch_index'], { unique: true, where: 'batch_id IS NOT NULL' })
@Index('execution_batch_unfinished', ['batch_id', 'batch_index'], {
  where: `batch_id IS NOT NULL AND status ${IS_UNFINISHED}`,
})
@Index('execution_unfinished', ['status'], { where: `status ${IS_UNFINISHED}` })
export class Execution {
  /** A UUID of version 7, so that ids ascend in the order of acceptance. */
  @PrimaryColumn('uuid')
  execution_id: string;

  @Column('uuid')
  deployment_id: string;

  @Column('text')
  deployment_name: string;

  @Column('text')
  environment: string;

  @Column('uuid')
  workflow_id: string;

  @Column('uuid')
  revision_id: string;

  @Column('text')
  status: ExecutionStatus;

  /** How often a worker took it up. */
  @Column('integer', { default: 0 })
  attempt: number;

  /** The fencing token of the attempt that owns it and its log: random, 0 before the first one. */
  @Column('integer', { default: 0 })
  fence: number;

  /** The lease of the process that runs it (`worker_lease`). True only while `leased_fence` is `fence`. */
  @Column('uuid', { nullable: true })
  worker_id: string | null;

  /** The fence that the claim with this lease gave. A process of an earlier build gives another one, and knows no leases. */
  @Column('integer', { nullable: true })
  leased_fence: number | null;

  /** How often in a row its worker was lost, without a step that came to its end in between. From the second on it is a suspect. */
  @Column('integer', { default: 0 })
  losses: number;

  /** Those of its losses that speak against it: it was the only suspect of the process. */
  @Column('integer', { default: 0 })
  counted_losses: number;

  /** When its worker was found lost last. */
  @Column({ type: 'timestamptz', nullable: true })
  lost_at: Date | null;

  /** Losses that processes of an earlier build counted; the next claim adds them to `losses`. */
  @Column('integer', { default: 0 })
  lost_attempts: number;

  /** False while it waits for others of its deployment to end (`max_concurrency`), and is not in the queue. */
  @Column('boolean', { default: true })
  admitted: boolean;

  /** The batch that it is an item of. */
  @Column('uuid', { nullable: true })
  batch_id: string | null;

  /** Its place among the items, from 0. */
  @Column('integer', { nullable: true })
  batch_index: number | null;

  /** The client's name for the item. */
  @Column('text', { nullable: true })
  item_id: string | null;

  /** True while it waits for other items of its batch (`concurrency`); it is not admitted then either. */
  @Column('boolean', { default: false })
  held: boolean;

  @Column('json')
  input: ExecutionInput;

  /** The client's `Idempotency-Key`: a request with the same one gets this execution, or the batch whose first item it is. */
  @Column('text', { nullable: true })
  idempotency_key: string | null;

  /** A JSON string, because `text` can't hold U+0000; null until the end. */
  @Column('json', { nullable: true })
  response: string | null;

  @Column('text', { nullable: true })
  error: string | null;

  @Column('text', { nullable: true })
  code: string | null;

  @Column('integer', { default: 0 })
  input_tokens: number;

  @Column('integer', { default: 0 })
  output_tokens: number;

  /** Sequence of the terminal chunk; null until the end. */
  @Column('integer', { nullable: true })
  last_sequence: number | null;

  @Column({ type: 'timestamptz', precision: 3 })
  created_at: Date;

  @Column({ type: 'timestamptz', precision: 3, nullable: true })
  started_at: Date | null;

  @Column({ type: 'timestamptz', precision: 3, nullable: true })
  first_chunk_at: Date | null;

  @Column({ type: 'timestamptz', precision: 3, nullable: true })
  finished_at: Date | null;

  @Column({ type: 'timestamptz', precision: 3, nullable: true })
  cancel_requested_at: Date | null;

  /** When retention deleted its chunks; null as long as they are kept. */
  @Column({ type: 'timestamptz', precision: 3, nullable: true })
  log_deleted_at: Date | null;
}

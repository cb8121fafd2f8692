import { Column, Entity, PrimaryColumn } from 'typeorm';

/**
 * A process that runs executions. It renews its one lease for all of them: what it runs has its `worker_id`, and is taken
 * back once the lease was not renewed for `lease_ms`.
 */
@Entity('worker_lease')
export class WorkerLease {
  /** Random; a process whose lease was lost gets another one. */
  @PrimaryColumn('uuid')
  worker_id: string;

  /** By the database's clock. The others see by their own monotonic clocks how long it stays the same. */
  @Column('timestamptz')
  renewed_at: Date;

  /** Its `JOB_LOCK_MS`. */
  @Column('integer')
  lease_ms: number;

  /** When another process found it lost; null until then. Kept for a while, since it tells what else was lost at that time. */
  @Column({ type: 'timestamptz', nullable: true })
  lost_at: Date | null;

  /** Whether it ran a suspect when it was lost, which may be the reason. */
  @Column('boolean', { default: false })
  ran_suspect: boolean;
}

import { Column, Entity, Index, PrimaryGeneratedColumn } from 'typeorm';

/**
 * A change of status of an execution or of a deployment. Triggers on their tables write it in the transaction of the
 * change, so that none is left out.
 */
@Entity('status_event')
@Index('status_event_pending', ['event_id'], { where: 'sequence IS NULL' })
@Index('status_event_sequence', ['sequence'], { unique: true })
export class StatusEvent {
  /** In the order of the changes, but not of their commits. */
  @PrimaryGeneratedColumn('identity', { type: 'bigint', generatedIdentity: 'ALWAYS' })
  event_id: string;

  /** In the order in which they can be read: given after the commit, and null before. */
  @Column('bigint', { nullable: true })
  sequence: string | null;

  @Column('uuid')
  deployment_id: string;

  @Column('text')
  deployment_name: string;

  @Column('text')
  environment: string;

  @Column('uuid')
  workflow_id: string;

  /** Null if it is the deployment's status that changed. */
  @Column('uuid', { nullable: true })
  execution_id: string | null;

  @Column('text')
  status: string;

  /** How often a worker took the execution up. */
  @Column('integer', { nullable: true })
  attempts: number | null;

  /** Why the execution failed. */
  @Column('text', { nullable: true })
  code: string | null;

  @Column({ type: 'timestamptz', precision: 3 })
  created_at: Date;
}

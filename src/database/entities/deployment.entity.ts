import { Column, Entity, Index, PrimaryColumn, Unique } from 'typeorm';

/** A workflow made executable under a name in an environment, with the counters of its executions. */
@Entity('deployment')
@Unique('deployment_name_environment', ['deployment_name', 'environment'])
export class Deployment {
  @PrimaryColumn('uuid')
  deployment_id: string;

  @Column('text')
  deployment_name: string;

  @Column('text')
  environment: string;

  @Index('deployment_workflow')
  @Column('uuid')
  workflow_id: string;

  /** The configuration that new executions run with. */
  @Column('uuid')
  revision_id: string;

  @Column('text')
  status: 'active' | 'inactive';

  @Column('text', { nullable: true })
  deployed_by: string | null;

  @Column({ type: 'timestamptz', precision: 3 })
  deployed_at: Date;

  @Column({ type: 'timestamptz', precision: 3, nullable: true })
  stopped_at: Date | null;

  /** Executions that have ended; completed, failed and cancelled ones add up to it. */
  @Column('integer', { default: 0 })
  execution_count: number;

  @Column('integer', { default: 0 })
  success_count: number;

  @Column('integer', { default: 0 })
  error_count: number;

  @Column('integer', { default: 0 })
  cancelled_count: number;

  @Column({ type: 'timestamptz', precision: 3, nullable: true })
  last_executed_at: Date | null;

  @Column('text', { nullable: true })
  last_error: string | null;

  @Column({ type: 'timestamptz', precision: 3, nullable: true })
  last_error_at: Date | null;
}

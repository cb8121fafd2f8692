import { Column, Entity, Index, PrimaryColumn } from 'typeorm';
import type { RuntimeConfig, WorkflowConfiguration } from './configuration.js';

/**
 * The configuration that a deployment was deployed with. It never changes, so that an execution that was accepted
 * before a redeployment, or goes on in another process after a crash, runs the graph that it began with.
 */
@Entity('deployment_revision')
export class DeploymentRevision {
  @PrimaryColumn('uuid')
  revision_id: string;

  @Index('deployment_revision_deployment')
  @Column('uuid')
  deployment_id: string;

  @Column('json')
  configuration: WorkflowConfiguration;

  @Column('json')
  runtime_config: RuntimeConfig;

  @Column({ type: 'timestamptz', precision: 3, default: () => 'now()' })
  created_at: Date;
}

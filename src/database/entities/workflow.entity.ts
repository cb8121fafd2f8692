import { Column, Entity, PrimaryColumn, Unique } from 'typeorm';
import type { WorkflowConfiguration } from './configuration.js';

/** A named, versioned definition of a graph of agents. */
@Entity('workflow')
@Unique('workflow_name_version', ['name', 'version'])
export class Workflow {
  @PrimaryColumn('uuid')
  workflow_id: string;

  @Column('text')
  name: string;

  @Column('text')
  version: string;

  @Column('text', { nullable: true })
  description: string | null;

  /** `json`, not `jsonb`: it keeps the text as it came, U+0000 and lone surrogates included. */
  @Column('json')
  configuration: WorkflowConfiguration;

  @Column('boolean', { default: true })
  is_active: boolean;

  @Column({ type: 'timestamptz', precision: 3, default: () => 'now()' })
  created_at: Date;

  @Column({ type: 'timestamptz', precision: 3, default: () => 'now()' })
  updated_at: Date;
}

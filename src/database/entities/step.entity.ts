import { Column, Entity, PrimaryColumn, Unique } from 'typeorm';
import type { StepStatus } from '../../executions/status.js';

/** The run of one agent inside an execution; finished ones are the checkpoints that a crash does not repeat. */
@Entity('step')
@Unique('step_execution_agent', ['execution_id', 'agent_id'])
export class Step {
  @PrimaryColumn('uuid')
  step_id: string;

  @Column('uuid')
  execution_id: string;

  @Column('text')
  agent_id: string;

  @Column('text')
  status: StepStatus;

  /** The execution's attempt that ran it last. */
  @Column('integer')
  attempt: number;

  /** A JSON string, because `text` can't hold U+0000. */
  @Column('json', { nullable: true })
  output: string | null;

  @Column('text', { nullable: true })
  error: string | null;

  @Column('text', { nullable: true })
  code: string | null;

  @Column('integer', { default: 0 })
  input_tokens: number;

  @Column('integer', { default: 0 })
  output_tokens: number;

  @Column({ type: 'timestamptz', precision: 3, nullable: true })
  started_at: Date | null;

  @Column({ type: 'timestamptz', precision: 3, nullable: true })
  finished_at: Date | null;
}

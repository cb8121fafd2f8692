import { Column, Entity, PrimaryColumn } from 'typeorm';

/** The clients of an execution at one process of the server. A table of its own: what the run writes never waits for it. */
@Entity('execution_subscriber')
export class ExecutionSubscriber {
  @PrimaryColumn('uuid')
  execution_id: string;

  @PrimaryColumn('uuid')
  process_id: string;

  /** Open streams and waiting requests. */
  @Column('integer')
  count: number;

  /** When the last of them left before the execution's end; null while there is one. */
  @Column({ type: 'timestamptz', precision: 3, nullable: true })
  left_at: Date | null;
}

import { Column, Entity, PrimaryColumn } from 'typeorm';

/** One flush of an execution's log: consecutive chunks, each a line of JSON. */
@Entity('execution_chunk')
export class ExecutionChunk {
  @PrimaryColumn('uuid')
  execution_id: string;

  @PrimaryColumn('integer')
  first_sequence: number;

  @Column('integer')
  last_sequence: number;

  /** JSON as text, joined by LF: `jsonb` refuses U+0000 and lone surrogates, which models do emit. */
  @Column('text')
  chunks: string;
}

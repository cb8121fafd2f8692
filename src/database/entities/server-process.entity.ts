import { Column, Entity, PrimaryColumn } from 'typeorm';

/** A process of the server that counts clients, and its last sign of life. */
@Entity('server_process')
export class ServerProcess {
  @PrimaryColumn('uuid')
  process_id: string;

  @Column({ type: 'timestamptz', precision: 3 })
  seen_at: Date;
}

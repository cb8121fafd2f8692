import { Column, Entity, PrimaryColumn } from 'typeorm';

/** A piece of the order in which the chunks of a batch's logs are read as one; written by whoever reads first. */
@Entity('batch_order')
export class BatchOrder {
  @PrimaryColumn('uuid')
  batch_id: string;

  /** Position of the first chunk; positions are 1, 2, 3 … without gaps within a batch. */
  @PrimaryColumn('integer')
  first_position: number;

  @Column('integer')
  last_position: number;

  /** Ranges of sequences, one after the other, as `<member>:<first>-<last>,…`; member 0 is the batch, the others its items. */
  @Column('text')
  parts: string;

  /** How far each member is read up to here; with some rows only, so that the next writer need not read all of them. */
  @Column('integer', { array: true, nullable: true })
  merged: number[] | null;
}

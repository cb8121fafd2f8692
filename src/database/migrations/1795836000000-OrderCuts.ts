import { MigrationInterface, QueryRunner } from 'typeorm';

export class OrderCuts1795836000000 implements MigrationInterface {
  name = 'OrderCuts1795836000000';

  public async up(queryRunner: QueryRunner): Promise<void> {
    await queryRunner.query(`
            ALTER TABLE "batch"
            ADD "order_cuts" integer NOT NULL DEFAULT '0'
        `);
  }

  public async down(queryRunner: QueryRunner): Promise<void> {
    await queryRunner.query(`
            ALTER TABLE "batch" DROP COLUMN "order_cuts"
        `);
  }
}

import { MigrationInterface, QueryRunner } from 'typeorm';

export class IdempotencyKey1795409219638 implements MigrationInterface {
  name = 'IdempotencyKey1795409219638';

  public async up(queryRunner: QueryRunner): Promise<void> {
    await queryRunner.query(`
            ALTER TABLE "execution"
            ADD "idempotency_key" text
        `);
    await queryRunner.query(`
            CREATE UNIQUE INDEX "execution_idempotency_key" ON "execution" ("idempotency_key")
            WHERE idempotency_key IS NOT NULL
        `);
  }

  public async down(queryRunner: QueryRunner): Promise<void> {
    await queryRunner.query(`
            DROP INDEX "public"."execution_idempotency_key"
        `);
    await queryRunner.query(`
            ALTER TABLE "execution" DROP COLUMN "idempotency_key"
        `);
  }
}

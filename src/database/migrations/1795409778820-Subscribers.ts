import { MigrationInterface, QueryRunner } from 'typeorm';

export class Subscribers1795409778820 implements MigrationInterface {
  name = 'Subscribers1795409778820';

  public async up(queryRunner: QueryRunner): Promise<void> {
    await queryRunner.query(`
            CREATE TABLE "server_process" (
                "process_id" uuid NOT NULL,
                "seen_at" TIMESTAMP(3) WITH TIME ZONE NOT NULL,
                CONSTRAINT "PK_cb0ed71ec1a674722efb20f8676" PRIMARY KEY ("process_id")
            )
        `);
    await queryRunner.query(`
            ALTER TABLE "execution"
            ADD "subscribers" jsonb NOT NULL DEFAULT '{}'
        `);
    await queryRunner.query(`
            ALTER TABLE "execution"
            ADD "disconnected_at" TIMESTAMP(3) WITH TIME ZONE
        `);
    await queryRunner.query(`
            CREATE INDEX "execution_subscribed" ON "execution" ("execution_id")
            WHERE subscribers <> '{}'
        `);
  }

  public async down(queryRunner: QueryRunner): Promise<void> {
    await queryRunner.query(`
            DROP INDEX "public"."execution_subscribed"
        `);
    await queryRunner.query(`
            ALTER TABLE "execution" DROP COLUMN "disconnected_at"
        `);
    await queryRunner.query(`
            ALTER TABLE "execution" DROP COLUMN "subscribers"
        `);
    await queryRunner.query(`
            DROP TABLE "server_process"
        `);
  }
}

import { MigrationInterface, QueryRunner } from 'typeorm';

export class Batches1795631175840 implements MigrationInterface {
  name = 'Batches1795631175840';

  public async up(queryRunner: QueryRunner): Promise<void> {
    await queryRunner.query(`
            CREATE TABLE "batch_order" (
                "batch_id" uuid NOT NULL,
                "first_position" integer NOT NULL,
                "last_position" integer NOT NULL,
                "parts" text NOT NULL,
                "merged" integer array,
                CONSTRAINT "PK_ed0086ff140fced3b31c6e7de1e" PRIMARY KEY ("batch_id", "first_position")
            )
        `);
    await queryRunner.query(`
            CREATE TABLE "batch" (
                "batch_id" uuid NOT NULL,
                "deployment_id" uuid NOT NULL,
                "deployment_name" text NOT NULL,
                "environment" text NOT NULL,
                "workflow_id" uuid NOT NULL,
                "request_hash" text NOT NULL,
                "concurrency" integer NOT NULL,
                "on_item_error" text NOT NULL,
                "status" text NOT NULL,
                "created_at" TIMESTAMP(3) WITH TIME ZONE NOT NULL,
                "finished_at" TIMESTAMP(3) WITH TIME ZONE,
                "cancel_requested_at" TIMESTAMP(3) WITH TIME ZONE,
                "log_deleted_at" TIMESTAMP(3) WITH TIME ZONE,
                CONSTRAINT "PK_9313bb90290d198f9817ef8ce46" PRIMARY KEY ("batch_id")
            )
        `);
    await queryRunner.query(`
            CREATE INDEX "batch_log_kept" ON "batch" ("finished_at")
            WHERE log_deleted_at IS NULL
                AND finished_at IS NOT NULL
        `);
    await queryRunner.query(`
            CREATE INDEX "batch_running" ON "batch" ("batch_id")
            WHERE status = 'running'
        `);
    await queryRunner.query(`
            ALTER TABLE "execution"
            ADD "batch_id" uuid
        `);
    await queryRunner.query(`
            ALTER TABLE "execution"
            ADD "batch_index" integer
        `);
    await queryRunner.query(`
            ALTER TABLE "execution"
            ADD "item_id" text
        `);
    await queryRunner.query(`
            ALTER TABLE "execution"
            ADD "held" boolean NOT NULL DEFAULT false
        `);
    await queryRunner.query(`
            CREATE INDEX "execution_batch_unfinished" ON "execution" ("batch_id", "batch_index")
            WHERE batch_id IS NOT NULL
                AND status IN ('queued', 'running')
        `);
    await queryRunner.query(`
            CREATE UNIQUE INDEX "execution_batch" ON "execution" ("batch_id", "batch_index")
            WHERE batch_id IS NOT NULL
        `);
    await queryRunner.query(`
            DROP INDEX "public"."execution_held_back"
        `);
    await queryRunner.query(`
            CREATE INDEX "execution_held_back" ON "execution" ("deployment_id", "execution_id")
            WHERE NOT admitted
                AND NOT held
                AND status = 'queued'
        `);
  }

  public async down(queryRunner: QueryRunner): Promise<void> {
    await queryRunner.query(`
            DROP INDEX "public"."execution_held_back"
        `);
    await queryRunner.query(`
            CREATE INDEX "execution_held_back" ON "execution" ("deployment_id", "execution_id")
            WHERE NOT admitted
                AND status = 'queued'
        `);
    await queryRunner.query(`
            DROP INDEX "public"."execution_batch"
        `);
    await queryRunner.query(`
            DROP INDEX "public"."execution_batch_unfinished"
        `);
    await queryRunner.query(`
            ALTER TABLE "execution" DROP COLUMN "held"
        `);
    await queryRunner.query(`
            ALTER TABLE "execution" DROP COLUMN "item_id"
        `);
    await queryRunner.query(`
            ALTER TABLE "execution" DROP COLUMN "batch_index"
        `);
    await queryRunner.query(`
            ALTER TABLE "execution" DROP COLUMN "batch_id"
        `);
    await queryRunner.query(`
            DROP INDEX "public"."batch_running"
        `);
    await queryRunner.query(`
            DROP INDEX "public"."batch_log_kept"
        `);
    await queryRunner.query(`
            DROP TABLE "batch"
        `);
    await queryRunner.query(`
            DROP TABLE "batch_order"
        `);
  }
}

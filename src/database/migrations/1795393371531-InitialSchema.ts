import { MigrationInterface, QueryRunner } from 'typeorm';

export class InitialSchema1795393371531 implements MigrationInterface {
  name = 'InitialSchema1795393371531';

  public async up(queryRunner: QueryRunner): Promise<void> {
    await queryRunner.query(`
            CREATE TABLE "deployment_revision" (
                "revision_id" uuid NOT NULL,
                "deployment_id" uuid NOT NULL,
                "configuration" json NOT NULL,
                "runtime_config" json NOT NULL,
                "created_at" TIMESTAMP(3) WITH TIME ZONE NOT NULL DEFAULT now(),
                CONSTRAINT "PK_b6604f4a26f817328162dd4c6e0" PRIMARY KEY ("revision_id")
            )
        `);
    await queryRunner.query(`
            CREATE INDEX "deployment_revision_deployment" ON "deployment_revision" ("deployment_id")
        `);
    await queryRunner.query(`
            CREATE TABLE "deployment" (
                "deployment_id" uuid NOT NULL,
                "deployment_name" text NOT NULL,
                "environment" text NOT NULL,
                "workflow_id" uuid NOT NULL,
                "revision_id" uuid NOT NULL,
                "status" text NOT NULL,
                "deployed_by" text,
                "deployed_at" TIMESTAMP(3) WITH TIME ZONE NOT NULL,
                "stopped_at" TIMESTAMP(3) WITH TIME ZONE,
                "execution_count" integer NOT NULL DEFAULT '0',
                "success_count" integer NOT NULL DEFAULT '0',
                "error_count" integer NOT NULL DEFAULT '0',
                "cancelled_count" integer NOT NULL DEFAULT '0',
                "last_executed_at" TIMESTAMP(3) WITH TIME ZONE,
                "last_error" text,
                "last_error_at" TIMESTAMP(3) WITH TIME ZONE,
                CONSTRAINT "deployment_name_environment" UNIQUE ("deployment_name", "environment"),
                CONSTRAINT "PK_faf4a8b17dacc9a6f37f0735812" PRIMARY KEY ("deployment_id")
            )
        `);
    await queryRunner.query(`
            CREATE INDEX "deployment_workflow" ON "deployment" ("workflow_id")
        `);
    await queryRunner.query(`
            CREATE TABLE "execution_chunk" (
                "execution_id" uuid NOT NULL,
                "first_sequence" integer NOT NULL,
                "last_sequence" integer NOT NULL,
                "chunks" text NOT NULL,
                CONSTRAINT "PK_58b4e5cf988a0dcbfaf701ff76b" PRIMARY KEY ("execution_id", "first_sequence")
            )
        `);
    await queryRunner.query(`
            CREATE TABLE "execution" (
                "execution_id" uuid NOT NULL,
                "deployment_id" uuid NOT NULL,
                "deployment_name" text NOT NULL,
                "environment" text NOT NULL,
                "workflow_id" uuid NOT NULL,
                "revision_id" uuid NOT NULL,
                "status" text NOT NULL,
                "attempt" integer NOT NULL DEFAULT '0',
                "input" json NOT NULL,
                "response" json,
                "error" text,
                "code" text,
                "input_tokens" integer NOT NULL DEFAULT '0',
                "output_tokens" integer NOT NULL DEFAULT '0',
                "last_sequence" integer,
                "created_at" TIMESTAMP(3) WITH TIME ZONE NOT NULL,
                "started_at" TIMESTAMP(3) WITH TIME ZONE,
                "first_chunk_at" TIMESTAMP(3) WITH TIME ZONE,
                "finished_at" TIMESTAMP(3) WITH TIME ZONE,
                "cancel_requested_at" TIMESTAMP(3) WITH TIME ZONE,
                CONSTRAINT "PK_b3c652d82f6b8722431e808dab0" PRIMARY KEY ("execution_id")
            )
        `);
    await queryRunner.query(`
            CREATE INDEX "execution_unfinished" ON "execution" ("status")
            WHERE status IN ('queued', 'running')
        `);
    await queryRunner.query(`
            CREATE INDEX "execution_deployment_finished" ON "execution" ("deployment_id", "finished_at")
        `);
    await queryRunner.query(`
            CREATE TABLE "step" (
                "step_id" uuid NOT NULL,
                "execution_id" uuid NOT NULL,
                "agent_id" text NOT NULL,
                "status" text NOT NULL,
                "attempt" integer NOT NULL,
                "output" json,
                "error" text,
                "code" text,
                "input_tokens" integer NOT NULL DEFAULT '0',
                "output_tokens" integer NOT NULL DEFAULT '0',
                "started_at" TIMESTAMP(3) WITH TIME ZONE,
                "finished_at" TIMESTAMP(3) WITH TIME ZONE,
                CONSTRAINT "step_execution_agent" UNIQUE ("execution_id", "agent_id"),
                CONSTRAINT "PK_c7c74e44e8c04648aef7385f5bf" PRIMARY KEY ("step_id")
            )
        `);
    await queryRunner.query(`
            CREATE TABLE "workflow" (
                "workflow_id" uuid NOT NULL,
                "name" text NOT NULL,
                "version" text NOT NULL,
                "description" text,
                "configuration" json NOT NULL,
                "is_active" boolean NOT NULL DEFAULT true,
                "created_at" TIMESTAMP(3) WITH TIME ZONE NOT NULL DEFAULT now(),
                "updated_at" TIMESTAMP(3) WITH TIME ZONE NOT NULL DEFAULT now(),
                CONSTRAINT "workflow_name_version" UNIQUE ("name", "version"),
                CONSTRAINT "PK_d9c81fc69a4da13e78121ad2953" PRIMARY KEY ("workflow_id")
            )
        `);
  }

  public async down(queryRunner: QueryRunner): Promise<void> {
    await queryRunner.query(`
            DROP TABLE "workflow"
        `);
    await queryRunner.query(`
            DROP TABLE "step"
        `);
    await queryRunner.query(`
            DROP INDEX "public"."execution_deployment_finished"
        `);
    await queryRunner.query(`
            DROP INDEX "public"."execution_unfinished"
        `);
    await queryRunner.query(`
            DROP TABLE "execution"
        `);
    await queryRunner.query(`
            DROP TABLE "execution_chunk"
        `);
    await queryRunner.query(`
            DROP INDEX "public"."deployment_workflow"
        `);
    await queryRunner.query(`
            DROP TABLE "deployment"
        `);
    await queryRunner.query(`
            DROP INDEX "public"."deployment_revision_deployment"
        `);
    await queryRunner.query(`
            DROP TABLE "deployment_revision"
        `);
  }
}

import { MigrationInterface, QueryRunner } from 'typeorm';

export class Subscribers1795415875837 implements MigrationInterface {
  name = 'Subscribers1795415875837';

  public async up(queryRunner: QueryRunner): Promise<void> {
    await queryRunner.query(`
            CREATE TABLE "execution_subscriber" (
                "execution_id" uuid NOT NULL,
                "process_id" uuid NOT NULL,
                "count" integer NOT NULL,
                "left_at" TIMESTAMP(3) WITH TIME ZONE,
                CONSTRAINT "PK_9da51978c6292d3a605f85c2c5a" PRIMARY KEY ("execution_id", "process_id")
            )
        `);
    await queryRunner.query(`
            CREATE TABLE "server_process" (
                "process_id" uuid NOT NULL,
                "seen_at" TIMESTAMP(3) WITH TIME ZONE NOT NULL,
                CONSTRAINT "PK_cb0ed71ec1a674722efb20f8676" PRIMARY KEY ("process_id")
            )
        `);
  }

  public async down(queryRunner: QueryRunner): Promise<void> {
    await queryRunner.query(`
            DROP TABLE "server_process"
        `);
    await queryRunner.query(`
            DROP TABLE "execution_subscriber"
        `);
  }
}

import { MigrationInterface, QueryRunner } from 'typeorm';

export class Counters1795821098661 implements MigrationInterface {
  name = 'Counters1795821098661';

  public async up(queryRunner: QueryRunner): Promise<void> {
    // An end that is under way counts wholly before this, and every later one wholly after it.
    await queryRunner.query(`
            LOCK TABLE "execution", "deployment" IN SHARE ROW EXCLUSIVE MODE
        `);
    await queryRunner.query(`
            CREATE TABLE "counter_delta" (
                "deployment_id" uuid NOT NULL,
                "execution_id" uuid NOT NULL,
                "status" text NOT NULL,
                "finished_at" TIMESTAMP(3) WITH TIME ZONE NOT NULL,
                "duration_ms" integer NOT NULL,
                "time_to_first_chunk_ms" integer,
                "input_tokens" bigint NOT NULL,
                "output_tokens" bigint NOT NULL,
                "folded" boolean NOT NULL DEFAULT false,
                CONSTRAINT "PK_2ade02434e5fa3e55ddc5b79024" PRIMARY KEY ("deployment_id", "execution_id")
            )
        `);
    await queryRunner.query(`
            CREATE TABLE "execution_statistics" (
                "deployment_id" uuid NOT NULL,
                "granularity" text NOT NULL,
                "bucket_start" TIMESTAMP(3) WITH TIME ZONE NOT NULL,
                "execution_count" integer NOT NULL,
                "success_count" integer NOT NULL,
                "error_count" integer NOT NULL,
                "cancelled_count" integer NOT NULL,
                "input_tokens" bigint NOT NULL,
                "output_tokens" bigint NOT NULL,
                "last_executed_at" TIMESTAMP(3) WITH TIME ZONE NOT NULL,
                "last_error_at" TIMESTAMP(3) WITH TIME ZONE,
                "duration_bins" integer array NOT NULL,
                "duration_counts" integer array NOT NULL,
                "first_chunk_bins" integer array NOT NULL,
                "first_chunk_counts" integer array NOT NULL,
                CONSTRAINT "PK_2b3a609bd45d3e72d768cf0ddef" PRIMARY KEY ("deployment_id", "granularity", "bucket_start")
            )
        `);
    await queryRunner.query(`
            CREATE TABLE "statistics_backfill" (
                "below" uuid NOT NULL,
                CONSTRAINT "PK_32bb30dbb5fab6ab14764e81550" PRIMARY KEY ("below")
            )
        `);
    await queryRunner.query(`
            INSERT INTO "statistics_backfill"
            SELECT 'ffffffff-ffff-ffff-ffff-ffffffffffff' WHERE EXISTS (SELECT 1 FROM "execution")
        `);
    await queryRunner.query(`
            CREATE FUNCTION note_execution_end() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                INSERT INTO counter_delta (deployment_id, execution_id, status, finished_at, duration_ms,
                                           time_to_first_chunk_ms, input_tokens, output_tokens)
                VALUES (NEW.deployment_id, NEW.execution_id, NEW.status, NEW.finished_at,
                        least(greatest(extract(epoch FROM NEW.finished_at - NEW.created_at) * 1000, 0), 2147483647),
                        CASE WHEN NEW.first_chunk_at IS NOT NULL THEN
                          least(greatest(extract(epoch FROM NEW.first_chunk_at - NEW.created_at) * 1000, 0), 2147483647)
                        END,
                        NEW.input_tokens, NEW.output_tokens)
                ON CONFLICT DO NOTHING;
                RETURN NULL;
            END $$
        `);
    await queryRunner.query(`
            CREATE TRIGGER execution_ended AFTER UPDATE OF finished_at ON execution
            FOR EACH ROW WHEN (OLD.finished_at IS NULL AND NEW.finished_at IS NOT NULL)
            EXECUTE FUNCTION note_execution_end()
        `);
    // Processes of earlier releases add to the counters themselves what the trigger above notes as well.
    await queryRunner.query(`
            CREATE FUNCTION keep_deployment_counters() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                NEW.execution_count := OLD.execution_count;
                NEW.success_count := OLD.success_count;
                NEW.error_count := OLD.error_count;
                NEW.cancelled_count := OLD.cancelled_count;
                NEW.last_executed_at := OLD.last_executed_at;
                NEW.last_error := OLD.last_error;
                NEW.last_error_at := OLD.last_error_at;
                RETURN NEW;
            END $$
        `);
    await queryRunner.query(`
            CREATE TRIGGER deployment_counted BEFORE UPDATE OF execution_count ON deployment
            FOR EACH ROW WHEN (current_setting('agent_studio.folds_counters', true) IS DISTINCT FROM 'on')
            EXECUTE FUNCTION keep_deployment_counters()
        `);
  }

  public async down(queryRunner: QueryRunner): Promise<void> {
    await queryRunner.query(`
            DROP TRIGGER deployment_counted ON deployment
        `);
    await queryRunner.query(`
            DROP FUNCTION keep_deployment_counters()
        `);
    await queryRunner.query(`
            DROP TRIGGER execution_ended ON execution
        `);
    await queryRunner.query(`
            DROP FUNCTION note_execution_end()
        `);
    await queryRunner.query(`
            DROP TABLE "statistics_backfill"
        `);
    await queryRunner.query(`
            DROP TABLE "execution_statistics"
        `);
    await queryRunner.query(`
            DROP TABLE "counter_delta"
        `);
  }
}

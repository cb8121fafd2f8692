import { MigrationInterface, QueryRunner } from 'typeorm';

export class StatusEvents1795410971064 implements MigrationInterface {
  name = 'StatusEvents1795410971064';

  public async up(queryRunner: QueryRunner): Promise<void> {
    await queryRunner.query(`
            CREATE TABLE "status_event" (
                "event_id" bigint GENERATED ALWAYS AS IDENTITY NOT NULL,
                "sequence" bigint,
                "deployment_id" uuid NOT NULL,
                "deployment_name" text NOT NULL,
                "environment" text NOT NULL,
                "workflow_id" uuid NOT NULL,
                "execution_id" uuid,
                "status" text NOT NULL,
                "attempts" integer,
                "code" text,
                "created_at" TIMESTAMP(3) WITH TIME ZONE NOT NULL,
                CONSTRAINT "PK_6a66c667c3ed2bbe13869a297f3" PRIMARY KEY ("event_id")
            )
        `);
    await queryRunner.query(`
            CREATE UNIQUE INDEX "status_event_sequence" ON "status_event" ("sequence")
        `);
    await queryRunner.query(`
            CREATE INDEX "status_event_pending" ON "status_event" ("event_id")
            WHERE sequence IS NULL
        `);
    await queryRunner.query(`
            CREATE FUNCTION note_execution_status() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                INSERT INTO status_event (execution_id, deployment_id, deployment_name, environment, workflow_id, status,
                                          attempts, code, created_at)
                VALUES (NEW.execution_id, NEW.deployment_id, NEW.deployment_name, NEW.environment, NEW.workflow_id,
                        NEW.status, NEW.attempt, NEW.code,
                        CASE NEW.status WHEN 'queued' THEN NEW.created_at WHEN 'running' THEN now()
                                        ELSE coalesce(NEW.finished_at, now()) END);
                RETURN NULL;
            END $$
        `);
    await queryRunner.query(`
            CREATE TRIGGER execution_accepted AFTER INSERT ON execution
            FOR EACH ROW EXECUTE FUNCTION note_execution_status()
        `);
    await queryRunner.query(`
            CREATE TRIGGER execution_changed AFTER UPDATE OF status, attempt ON execution
            FOR EACH ROW WHEN (OLD.status <> NEW.status OR OLD.attempt <> NEW.attempt)
            EXECUTE FUNCTION note_execution_status()
        `);
    await queryRunner.query(`
            CREATE FUNCTION note_deployment_status() RETURNS trigger LANGUAGE plpgsql AS $$
            DECLARE
                deployment deployment := CASE TG_OP WHEN 'DELETE' THEN OLD ELSE NEW END;
            BEGIN
                INSERT INTO status_event (deployment_id, deployment_name, environment, workflow_id, status, created_at)
                VALUES (deployment.deployment_id, deployment.deployment_name, deployment.environment,
                        deployment.workflow_id, CASE TG_OP WHEN 'DELETE' THEN 'deleted' ELSE deployment.status END, now());
                RETURN NULL;
            END $$
        `);
    await queryRunner.query(`
            CREATE TRIGGER deployment_made AFTER INSERT OR DELETE ON deployment
            FOR EACH ROW EXECUTE FUNCTION note_deployment_status()
        `);
    await queryRunner.query(`
            CREATE TRIGGER deployment_changed AFTER UPDATE OF status ON deployment
            FOR EACH ROW WHEN (OLD.status <> NEW.status) EXECUTE FUNCTION note_deployment_status()
        `);
  }

  public async down(queryRunner: QueryRunner): Promise<void> {
    await queryRunner.query(`
            DROP TRIGGER deployment_changed ON deployment
        `);
    await queryRunner.query(`
            DROP TRIGGER deployment_made ON deployment
        `);
    await queryRunner.query(`
            DROP TRIGGER execution_changed ON execution
        `);
    await queryRunner.query(`
            DROP TRIGGER execution_accepted ON execution
        `);
    await queryRunner.query(`
            DROP FUNCTION note_deployment_status()
        `);
    await queryRunner.query(`
            DROP FUNCTION note_execution_status()
        `);
    await queryRunner.query(`
            DROP INDEX "public"."status_event_pending"
        `);
    await queryRunner.query(`
            DROP INDEX "public"."status_event_sequence"
        `);
    await queryRunner.query(`
            DROP TABLE "status_event"
        `);
  }
}

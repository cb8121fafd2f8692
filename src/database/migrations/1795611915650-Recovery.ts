import { MigrationInterface, QueryRunner } from 'typeorm';

/** The moment of an execution's status: an execution that was handed back is queued a second time, later than it was accepted. */
const noteExecutionStatus = (queuedAt: string) => `
            CREATE OR REPLACE FUNCTION note_execution_status() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                INSERT INTO status_event (execution_id, deployment_id, deployment_name, environment, workflow_id, status,
                                          attempts, code, created_at)
                VALUES (NEW.execution_id, NEW.deployment_id, NEW.deployment_name, NEW.environment, NEW.workflow_id,
                        NEW.status, NEW.attempt, NEW.code,
                        CASE NEW.status WHEN 'queued' THEN ${queuedAt} WHEN 'running' THEN now()
                                        ELSE coalesce(NEW.finished_at, now()) END);
                RETURN NULL;
            END $$
        `;

export class Recovery1795611915650 implements MigrationInterface {
  name = 'Recovery1795611915650';

  public async up(queryRunner: QueryRunner): Promise<void> {
    await queryRunner.query(`
            ALTER TABLE "execution"
            ADD "lost_attempts" integer NOT NULL DEFAULT '0'
        `);
    await queryRunner.query(`
            ALTER TABLE "execution"
            ADD "fence" integer NOT NULL DEFAULT '0'
        `);
    await queryRunner.query(`
            ALTER TABLE "execution"
            ADD "admitted" boolean NOT NULL DEFAULT true
        `);
    await queryRunner.query(`
            CREATE INDEX "execution_admitted" ON "execution" ("deployment_id")
            WHERE admitted
                AND status IN ('queued', 'running')
        `);
    await queryRunner.query(`
            CREATE INDEX "execution_held_back" ON "execution" ("deployment_id", "execution_id")
            WHERE NOT admitted
                AND status = 'queued'
        `);
    await queryRunner.query(
      noteExecutionStatus("CASE TG_OP WHEN 'INSERT' THEN NEW.created_at ELSE now() END"),
    );
  }

  public async down(queryRunner: QueryRunner): Promise<void> {
    await queryRunner.query(noteExecutionStatus('NEW.created_at'));
    await queryRunner.query(`
            DROP INDEX "public"."execution_held_back"
        `);
    await queryRunner.query(`
            DROP INDEX "public"."execution_admitted"
        `);
    await queryRunner.query(`
            ALTER TABLE "execution" DROP COLUMN "admitted"
        `);
    await queryRunner.query(`
            ALTER TABLE "execution" DROP COLUMN "fence"
        `);
    await queryRunner.query(`
            ALTER TABLE "execution" DROP COLUMN "lost_attempts"
        `);
  }
}

import { MigrationInterface, QueryRunner } from 'typeorm';

export class LogRetention1795411603992 implements MigrationInterface {
  name = 'LogRetention1795411603992';

  public async up(queryRunner: QueryRunner): Promise<void> {
    await queryRunner.query(`
            ALTER TABLE "execution"
            ADD "log_deleted_at" TIMESTAMP(3) WITH TIME ZONE
        `);
    await queryRunner.query(`
            CREATE INDEX "execution_log_kept" ON "execution" ("finished_at")
            WHERE log_deleted_at IS NULL
                AND finished_at IS NOT NULL
        `);
  }

  public async down(queryRunner: QueryRunner): Promise<void> {
    await queryRunner.query(`
            DROP INDEX "public"."execution_log_kept"
        `);
    await queryRunner.query(`
            ALTER TABLE "execution" DROP COLUMN "log_deleted_at"
        `);
  }
}

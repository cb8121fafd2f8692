import { MigrationInterface, QueryRunner } from 'typeorm';

export class WorkerLeases1795821330017 implements MigrationInterface {
  name = 'WorkerLeases1795821330017';

  public async up(queryRunner: QueryRunner): Promise<void> {
    await queryRunner.query(`
            CREATE TABLE "worker_lease" (
                "worker_id" uuid NOT NULL,
                "renewed_at" TIMESTAMP WITH TIME ZONE NOT NULL,
                "lease_ms" integer NOT NULL,
                "lost_at" TIMESTAMP WITH TIME ZONE,
                "ran_suspect" boolean NOT NULL DEFAULT false,
                CONSTRAINT "PK_de6bd55cd04aa7b92f1717011ec" PRIMARY KEY ("worker_id")
            ) WITH (fillfactor = 50)
        `);
    await queryRunner.query(`
            ALTER TABLE "execution"
            ADD "worker_id" uuid
        `);
    await queryRunner.query(`
            ALTER TABLE "execution"
            ADD "leased_fence" integer
        `);
    await queryRunner.query(`
            ALTER TABLE "execution"
            ADD "losses" integer NOT NULL DEFAULT '0'
        `);
    await queryRunner.query(`
            ALTER TABLE "execution"
            ADD "counted_losses" integer NOT NULL DEFAULT '0'
        `);
    await queryRunner.query(`
            ALTER TABLE "execution"
            ADD "lost_at" TIMESTAMP WITH TIME ZONE
        `);
  }

  public async down(queryRunner: QueryRunner): Promise<void> {
    for (const column of ['lost_at', 'counted_losses', 'losses', 'leased_fence', 'worker_id']) {
      await queryRunner.query(`ALTER TABLE "execution" DROP COLUMN "${column}"`);
    }
    await queryRunner.query(`DROP TABLE "worker_lease"`);
  }
}

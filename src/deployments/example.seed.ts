import { Inject, Injectable, Logger } from '@nestjs/common';
import type { OnApplicationBootstrap } from '@nestjs/common';
import { DataSource } from 'typeorm';
import { CONFIG } from '../config.js';
import type { Config } from '../config.js';
import { Workflow } from '../database/entities/workflow.entity.js';
import { LOCKS } from '../database/locks.js';
import { supportDesk, supportDeskId } from '../workflows/example.js';
import { DeploymentsService } from './deployments.service.js';

const INSERT_WORKFLOW = `
  INSERT INTO workflow (workflow_id, name, version, description, configuration, created_at, updated_at)
  VALUES ($1, $2, '1', $3, $4, $5, $5)`;

/** With `SEED_EXAMPLE=true`, gives a server that has no workflow yet the deployed example, so that there is one to try. */
@Injectable()
export class ExampleSeed implements OnApplicationBootstrap {
  private readonly logger = new Logger(ExampleSeed.name);

  constructor(
    @Inject(CONFIG) private readonly config: Config,
    private readonly dataSource: DataSource,
    private readonly deployments: DeploymentsService,
  ) {}

  async onApplicationBootstrap(): Promise<void> {
    if (this.config.SEED_EXAMPLE !== 'true') return;
    const { name, description, configuration } = supportDesk;
    await this.dataSource.transaction(async (transaction) => {
      // Of several processes that start at once, one seeds and the others then find what it made.
      await transaction.query('SELECT pg_advisory_xact_lock($1)', [LOCKS.seed]);
      if (await transaction.exists(Workflow)) return;
      const values = [supportDeskId, name, description, configuration, new Date()];
      await transaction.query(INSERT_WORKFLOW, values);
      await this.deployments.deploy(supportDeskId, { deployment_name: name }, transaction);
      this.logger.log(`The example workflow is deployed as "${name}".`);
    });
  }
}

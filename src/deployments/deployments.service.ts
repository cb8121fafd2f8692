import { isDeepStrictEqual } from 'node:util';
import { Injectable } from '@nestjs/common';
import type { MessageEvent } from '@nestjs/common';
import type { Response } from 'express';
import { Pool } from 'pg';
import type { Observable } from 'rxjs';
import { DataSource } from 'typeorm';
import type { EntityManager, FindOneOptions } from 'typeorm';
import { v7 as uuidv7, validate as isUuid } from 'uuid';
import { countedDeployment } from '../database/counted-deployment.js';
import type { RuntimeConfig } from '../database/entities/configuration.js';
import type { DeploymentRevision } from '../database/entities/deployment-revision.entity.js';
import type { Deployment } from '../database/entities/deployment.entity.js';
import { Workflow } from '../database/entities/workflow.entity.js';
import { present, quoted } from '../dto.js';
import type { Graph } from '../engine/graph.js';
import { AppError } from '../errors.js';
import { OneByOne } from '../one-by-one.js';
import type { DeploymentEventsQueryDto } from '../status-events/status-events.dto.js';
import { StatusStreams } from '../status-events/status.stream.js';
import { WorkflowsService, notFound as workflowNotFound } from '../workflows/workflows.service.js';
import { DEPLOYMENT_NAME, ENVIRONMENT } from './deployments.dto.js';
import type {
  DeploymentDetailsDto,
  DeploymentDto,
  DeploymentPageDto,
  DeployWorkflowDto,
  ListDeploymentsDto,
} from './deployments.dto.js';

/** What an execution of a deployment needs to begin. */
export type ActiveDeployment = Pick<
  Deployment,
  'deployment_id' | 'deployment_name' | 'environment' | 'workflow_id' | 'revision_id'
>;

/** A revision that can run. It never changes and is shared. */
export interface CompiledRevision {
  revision_id: string;
  runtime_config: RuntimeConfig;
  graph: Graph;
}

/** Row of a deployment and the name of its workflow, null once that is deleted. */
type DeploymentRow = Deployment & { workflow_name: string | null };
type FoundDeployment = ActiveDeployment & Pick<Deployment, 'status' | 'stopped_at'>;
/** A compiled revision, and the length of its definition once that was read. */
interface KeptRevision {
  readonly revision: Promise<CompiledRevision>;
  characters: number;
}
type RevisionRow = Pick<DeploymentRevision, 'configuration' | 'runtime_config'>;

const DEFAULT_ENVIRONMENT = 'production';
/** How often a workflow may change while it is compiled. */
const MOST_TRIES = 5;
/** Compiled graphs that are kept, and characters of their definitions: what is compiled may take a hundred times as much. */
const MOST_REVISIONS = 500;
const MOST_CHARACTERS = 4 * 1024 * 1024;
/** From here on compiling may take a tenth of a second and some MB. */
const LARGE_CHARACTERS = 64 * 1024;

const FIND_ACTIVE = {
  name: 'deployment-find-active',
  text: `
    SELECT deployment_id, deployment_name, environment, workflow_id, revision_id, status, stopped_at
      FROM deployment
     WHERE deployment_name = $1 AND ($2::text IS NULL OR environment = $2)
     ORDER BY status = 'active' DESC, environment = 'production' DESC, deployed_at DESC LIMIT 1`,
};

const FIND_REVISION = {
  name: 'deployment-find-revision',
  text: 'SELECT configuration, runtime_config FROM deployment_revision WHERE revision_id = $1',
};

const COUNT_STEPS = {
  name: 'deployment-count-steps',
  text: `
    SELECT json_array_length(configuration->'agents') AS steps FROM deployment_revision WHERE revision_id = $1`,
};

/** A new name, or an inactive one that becomes active again and keeps its counters; nothing if it is active. */
const ACTIVATE = `
  INSERT INTO deployment (deployment_id, deployment_name, environment, workflow_id, revision_id, status, deployed_by, deployed_at)
  VALUES ($1, $2, $3, $4, $5, 'active', $6, $7)
      ON CONFLICT (deployment_name, environment) DO UPDATE SET
         workflow_id = excluded.workflow_id, revision_id = excluded.revision_id, status = 'active',
         deployed_by = excluded.deployed_by, deployed_at = excluded.deployed_at, stopped_at = NULL
   WHERE deployment.status = 'inactive'
  RETURNING deployment_id`;

const INSERT_REVISION = `
  INSERT INTO deployment_revision (revision_id, deployment_id, configuration, runtime_config, created_at)
  VALUES ($1, $2, $3, $4, $5)`;

/** Stopping again changes nothing. */
const STOP = `
  UPDATE deployment SET status = 'inactive', stopped_at = coalesce(stopped_at, $2) WHERE deployment_id = $1`;

const SELECT = `
  SELECT deployment.*, workflow.name AS workflow_name
    FROM ${countedDeployment()} AS deployment LEFT JOIN workflow USING (workflow_id)`;

/** Not in the statement that changes the row: that one's counters would be older than its deltas, or newer. */
const READ = `${SELECT} WHERE deployment_id = $1`;

const LIST = `${SELECT}
   WHERE ($1::text IS NULL OR environment = $1) AND ($2::text IS NULL OR status = $2)
     AND ($3::uuid IS NULL OR deployment_id < $3)
   ORDER BY deployment_id DESC LIMIT $4`;

const LIST_ACTIVE = `${SELECT} WHERE status = 'active' ORDER BY deployed_at DESC, deployment_id DESC`;

/** $3: whether active ones come first. */
const FIND = `${SELECT}
   WHERE deployment_name = $1 AND ($2::text IS NULL OR environment = $2)
   ORDER BY ($3 AND status = 'active') DESC, environment = 'production' DESC, deployed_at DESC LIMIT 1`;

/**
 * Makes workflows executable. A method that takes a name rejects with `deployment_not_found` where there is none; where
 * several environments have the name and none is asked for, `production` comes first, then the newest.
 */
@Injectable()
export class DeploymentsService {
  /** By `revision_id`, the one that was used last at the end. */
  private readonly revisions = new Map<string, KeptRevision>();
  /** Large definitions are compiled one at a time: together they would need as much memory at once. */
  private readonly largeOnes = new OneByOne();

  constructor(
    private readonly pool: Pool,
    private readonly dataSource: DataSource,
    private readonly workflows: WorkflowsService,
    private readonly statuses: StatusStreams,
  ) {}

  /**
   * Deploys the workflow as it is now, in a transaction of its own or inside that of `manager`. Rejects with
   * `workflow_not_found`, `workflow_inactive`, `workflow_invalid` (its models may have gone), `deployment_exists`, or
   * `unavailable` where the workflow changes all the time.
   */
  async deploy(
    workflowId: string,
    body: DeployWorkflowDto,
    manager: EntityManager = this.dataSource.manager,
  ): Promise<DeploymentDto> {
    if (!isUuid(workflowId)) throw workflowNotFound(workflowId);
    for (let tries = 0; tries < MOST_TRIES; tries++) {
      // Compiling can take seconds, in which no transaction waits.
      const workflow = await findWorkflow(workflowId, manager);
      await this.workflows.compile(workflow.configuration, { stored: true });
      const deployed = await manager.transaction(async (transaction) => {
        // A deletion locks the same row, so no deployment is made of a workflow that goes at this moment.
        const current = await findWorkflow(workflowId, transaction, { mode: 'pessimistic_read' });
        const isCompiled = isDeepStrictEqual(current.configuration, workflow.configuration);
        return isCompiled ? activate(current, body, transaction) : undefined;
      });
      if (deployed) return present(deployed);
    }
    const message = 'The workflow is being changed again and again; try again in a moment.';
    throw new AppError('unavailable', message, { retryAfter: 1 });
  }

  async list({ environment, status, limit, cursor }: ListDeploymentsDto): Promise<DeploymentPageDto> {
    const values = [environment, status, cursor, limit + 1];
    const { rows } = await this.pool.query<DeploymentRow>(LIST, values);
    const items = rows.slice(0, limit).map(present);
    return { items, next_cursor: rows.length > limit ? items.at(-1)?.deployment_id : undefined };
  }

  async listActive(): Promise<DeploymentDto[]> {
    const { rows } = await this.pool.query<DeploymentRow>(LIST_ACTIVE);
    return rows.map(present);
  }

  async get(deploymentName: string, environment?: string): Promise<DeploymentDetailsDto> {
    const deployment = await this.find(deploymentName, environment);
    return { ...present(deployment), ...(await this.readRevision(deployment.revision_id)) };
  }

  /** Streams the status of a deployment, also beyond its deletion, and of its executions. */
  async watch(
    deploymentName: string,
    { environment, status, after }: DeploymentEventsQueryDto,
    client: { lastEventId?: string; response: Response },
  ): Promise<Observable<MessageEvent>> {
    const found = await this.find(deploymentName, environment);
    const filter = { deployment_name: deploymentName, environment: found.environment, status };
    return this.statuses.open({ ...filter, deployments: true }, { after, ...client });
  }

  /** The row of a deployment, be it active or not; with `preferActive`, active ones come before `production`. */
  async find(
    deploymentName: string,
    environment?: string,
    { preferActive = false } = {},
  ): Promise<DeploymentRow> {
    if (!isPossible(deploymentName, environment)) throw notFound(deploymentName, environment);
    const values = [deploymentName, environment, preferActive];
    const { rows } = await this.pool.query<DeploymentRow>(FIND, values);
    if (!rows[0]) throw notFound(deploymentName, environment);
    return rows[0];
  }

  /** Takes no new executions from here on; running ones end. Without an environment, an active one is meant first. */
  async stop(deploymentName: string, environment?: string): Promise<DeploymentDto> {
    const found = await this.find(deploymentName, environment, { preferActive: true });
    await this.pool.query(STOP, [found.deployment_id, new Date()]);
    const { rows } = await this.pool.query<DeploymentRow>(READ, [found.deployment_id]);
    if (!rows[0]) throw notFound(deploymentName, environment);
    return present(rows[0]);
  }

  /** Deletes the deployment with its counters. Its executions, and the revisions that they run, stay. */
  async remove(deploymentName: string, environment?: string): Promise<void> {
    const { deployment_id } = await this.find(deploymentName, environment);
    const { rowCount } = await this.pool.query('DELETE FROM deployment WHERE deployment_id = $1', [
      deployment_id,
    ]);
    if (rowCount === 0) throw notFound(deploymentName, environment);
  }

  /** Finds what a request to execute means. Rejects with `deployment_not_found` for an inactive deployment, too. */
  async findActive(deploymentName: string, environment?: string): Promise<ActiveDeployment> {
    if (!isPossible(deploymentName, environment)) throw notFound(deploymentName, environment);
    const values = [deploymentName, environment];
    const { rows } = await this.pool.query<FoundDeployment>({ ...FIND_ACTIVE, values });
    if (!rows[0]) throw notFound(deploymentName, environment);
    const { status, stopped_at, ...deployment } = rows[0];
    if (status === 'active') return deployment;
    throw new AppError(
      'deployment_not_found',
      `The deployment "${deployment.deployment_name}" (environment "${deployment.environment}") is not active: it was stopped at ${stopped_at?.toISOString()}. Deploy a workflow under this name again to use it.`,
    );
  }

  /**
   * The compiled graph of a revision and how to run it; those used last are kept in memory. Rejects with
   * `workflow_invalid` if the graph does not fit this server any more, as when its provider was removed.
   */
  revision(revisionId: string): Promise<CompiledRevision> {
    const kept = this.revisions.get(revisionId) ?? this.loadRevision(revisionId);
    this.revisions.delete(revisionId);
    this.revisions.set(revisionId, kept);
    return kept.revision;
  }

  /** How many steps an execution of a revision has, be it one that this server can't run any more. */
  async countSteps(revisionId: string): Promise<number> {
    const { rows } = await this.pool.query<{ steps: number }>({ ...COUNT_STEPS, values: [revisionId] });
    if (!rows[0]) throw revisionMissing(revisionId);
    return rows[0].steps;
  }

  private async readRevision(revisionId: string): Promise<RevisionRow> {
    const { rows } = await this.pool.query<RevisionRow>({ ...FIND_REVISION, values: [revisionId] });
    if (!rows[0]) throw revisionMissing(revisionId);
    return rows[0];
  }

  private loadRevision(revisionId: string): KeptRevision {
    const load = async (): Promise<CompiledRevision> => {
      const { configuration, runtime_config } = await this.readRevision(revisionId);
      kept.characters = JSON.stringify([configuration, runtime_config]).length;
      this.forgetOldest();
      const compile = () => this.workflows.compile(configuration, { stored: true });
      const graph = await (kept.characters > LARGE_CHARACTERS ? this.largeOnes.run(compile) : compile());
      return { revision_id: revisionId, runtime_config, graph };
    };
    const kept: KeptRevision = { revision: load(), characters: 0 };
    // Whoever asked sees the failure; the next one tries again.
    kept.revision.catch(() => this.revisions.delete(revisionId));
    return kept;
  }

  private forgetOldest(): void {
    let characters = 0;
    for (const kept of this.revisions.values()) characters += kept.characters;
    for (const [revisionId, kept] of this.revisions) {
      if (this.revisions.size <= MOST_REVISIONS && characters <= MOST_CHARACTERS) return;
      this.revisions.delete(revisionId);
      characters -= kept.characters;
    }
  }
}

async function findWorkflow(
  workflow_id: string,
  manager: EntityManager,
  lock?: FindOneOptions<Workflow>['lock'],
): Promise<Workflow> {
  const workflow = await manager.findOne(Workflow, { where: { workflow_id }, lock });
  if (!workflow) throw workflowNotFound(workflow_id);
  if (!workflow.is_active) throw workflowInactive(workflow);
  return workflow;
}

async function activate(
  workflow: Workflow,
  body: DeployWorkflowDto,
  transaction: EntityManager,
): Promise<DeploymentRow> {
  const { deployment_name, deployed_by } = body;
  const environment = body.environment ?? DEFAULT_ENVIRONMENT;
  const revision_id = uuidv7();
  const now = new Date();
  const [activated] = await transaction.query<Pick<Deployment, 'deployment_id'>[]>(ACTIVATE, [
    uuidv7(),
    deployment_name,
    environment,
    workflow.workflow_id,
    revision_id,
    deployed_by,
    now,
  ]);
  if (!activated) {
    throw new AppError(
      'deployment_exists',
      `There is an active deployment "${deployment_name}" in the environment "${environment}". Stop it first, or choose another name or environment.`,
    );
  }
  const runtimeConfig = body.runtime_config ?? {};
  const revision = [revision_id, activated.deployment_id, workflow.configuration, runtimeConfig, now];
  await transaction.query(INSERT_REVISION, revision);
  const [deployment] = await transaction.query<DeploymentRow[]>(READ, [activated.deployment_id]);
  if (!deployment) throw new Error(`The deployment ${activated.deployment_id} is missing.`);
  return deployment;
}

/** Other names can't exist, and PostgreSQL refuses some of them as text. */
function isPossible(deploymentName: string, environment?: string): boolean {
  return DEPLOYMENT_NAME.test(deploymentName) && (environment === undefined || ENVIRONMENT.test(environment));
}

function notFound(deploymentName: string, environment?: string): AppError {
  const where = environment === undefined ? '' : ` in the environment ${quoted(environment)}`;
  return new AppError(
    'deployment_not_found',
    `There is no deployment ${quoted(deploymentName)}${where}. Deploy a workflow under this name first.`,
  );
}

function revisionMissing(revisionId: string): Error {
  return new Error(`The revision ${revisionId} is missing.`);
}

function workflowInactive({ workflow_id, name }: Workflow): AppError {
  return new AppError(
    'workflow_inactive',
    `The workflow ${quoted(name)} is not active. Set its is_active to true first (PUT /api/workflows/${workflow_id}).`,
  );
}

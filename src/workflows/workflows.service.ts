import { Inject, Injectable } from '@nestjs/common';
import { DataSource, QueryFailedError } from 'typeorm';
import type { QueryDeepPartialEntity } from 'typeorm';
import { v7 as uuidv7, validate as isUuid } from 'uuid';
import { CONFIG } from '../config.js';
import type { Config } from '../config.js';
import type { WorkflowConfiguration } from '../database/entities/configuration.js';
import { Deployment } from '../database/entities/deployment.entity.js';
import { Workflow } from '../database/entities/workflow.entity.js';
import { present, quoted } from '../dto.js';
import { Evaluator } from '../engine/evaluation.js';
import type { Graph } from '../engine/graph.js';
import { compileGraphInTurns } from '../engine/graph.js';
import { AppError } from '../errors.js';
import { ModelRegistry } from '../models/model-registry.js';
import type { CreateWorkflowDto, ListWorkflowsDto, UpdateWorkflowDto, WorkflowDto } from './workflows.dto.js';

type WorkflowRow = Workflow & { is_deployed: boolean };

const UNIQUE_VIOLATION = '23505';

const SELECT = `
  SELECT * FROM (
    SELECT workflow_id, name, version, description, configuration, is_active,
           EXISTS (SELECT 1 FROM deployment
                    WHERE deployment.workflow_id = workflow.workflow_id AND deployment.status = 'active') AS is_deployed,
           created_at, updated_at
      FROM workflow) AS workflow`;

/** Inserts nothing if the name has the version already, be it given or found. */
const INSERT = `
  INSERT INTO workflow (workflow_id, name, version, description, configuration, is_active, created_at, updated_at)
  VALUES ($1, $2,
          coalesce($3, (SELECT (coalesce(max(version::numeric), 0) + 1)::text
                          FROM workflow WHERE name = $2 AND version ~ '^[0-9]+$')),
          $4, $5, $6, $7, $7)
      ON CONFLICT (name, version) DO NOTHING
  RETURNING workflow_id, name, version, description, configuration, is_active, false AS is_deployed, created_at, updated_at`;

const LIST = `${SELECT}
   WHERE ($1::boolean IS NULL OR is_active = $1) AND ($2::boolean IS NULL OR is_deployed = $2)
     AND ($3::text IS NULL OR strpos(lower(name), lower($3)) > 0)
   ORDER BY created_at DESC, workflow_id DESC LIMIT $4 OFFSET $5`;

/** Keeps the definitions of workflows. Rejects with `workflow_not_found` where there is none of the id given. */
@Injectable()
export class WorkflowsService {
  constructor(
    private readonly dataSource: DataSource,
    private readonly models: ModelRegistry,
    private readonly evaluator: Evaluator,
    @Inject(CONFIG) private readonly config: Config,
  ) {}

  /** Rejects with `workflow_invalid` and all faults. `stored`: whether it was accepted earlier, perhaps by an older server. */
  compile(configuration: WorkflowConfiguration, { stored = false } = {}): Promise<Graph> {
    const { MAX_AGENTS: maxAgents, MAX_CONNECTIONS: maxConnections } = this.config;
    const options = { models: this.models, limits: { maxAgents, maxConnections }, stored };
    return compileGraphInTurns(configuration, options, () => this.evaluator.turn());
  }

  /** Rejects with `workflow_invalid`, and with `workflow_exists` if the name has this version. */
  async create(body: CreateWorkflowDto): Promise<WorkflowDto> {
    await this.compile(body.configuration);
    const { name, version, description, configuration, is_active } = body;
    const values = [uuidv7(), name, version, description, configuration, is_active ?? true, new Date()];
    for (;;) {
      const [row] = await this.dataSource.query<WorkflowRow[]>(INSERT, values);
      if (row) return present(row);
      // Without a version of its own it has lost a race against another one, which got in: so this ends.
      if (version) throw versionTaken(name, version);
    }
  }

  async list({ skip, limit, is_active, is_deployed, name }: ListWorkflowsDto): Promise<WorkflowDto[]> {
    const rows = await this.dataSource.query<WorkflowRow[]>(LIST, [
      is_active,
      is_deployed,
      name,
      limit,
      skip,
    ]);
    return rows.map(present);
  }

  async get(workflowId: string): Promise<WorkflowDto> {
    if (!isUuid(workflowId)) throw notFound(workflowId);
    const rows = await this.dataSource.query<WorkflowRow[]>(`${SELECT} WHERE workflow_id = $1`, [workflowId]);
    if (!rows[0]) throw notFound(workflowId);
    return present(rows[0]);
  }

  /** Changes the definition alone: what is deployed goes on as it was deployed. Rejects as {@link create} does. */
  async update(workflowId: string, body: UpdateWorkflowDto): Promise<WorkflowDto> {
    if (!isUuid(workflowId)) throw notFound(workflowId);
    if (body.configuration) await this.compile(body.configuration);
    // Undefined leaves a column alone.
    const fields = {
      name: body.name ?? undefined,
      version: body.version ?? undefined,
      description: body.description,
      configuration: body.configuration ?? undefined,
      is_active: body.is_active ?? undefined,
      updated_at: new Date(),
    } as QueryDeepPartialEntity<Workflow>;
    try {
      await this.dataSource.getRepository(Workflow).update({ workflow_id: workflowId }, fields);
    } catch (error) {
      if (!isUniqueViolation(error)) throw error;
      const { name, version } = await this.get(workflowId);
      throw versionTaken(body.name ?? name, body.version ?? version);
    }
    return this.get(workflowId);
  }

  /** Rejects with `workflow_in_use` if the workflow has an active deployment. */
  async remove(workflowId: string): Promise<void> {
    if (!isUuid(workflowId)) throw notFound(workflowId);
    await this.dataSource.transaction(async (manager) => {
      // A deployment locks the same row, so either this finds it or it finds no workflow any more.
      const workflow = await manager.findOne(Workflow, {
        select: { workflow_id: true, name: true },
        where: { workflow_id: workflowId },
        lock: { mode: 'pessimistic_write' },
      });
      if (!workflow) throw notFound(workflowId);
      const deployment = await manager.findOneBy(Deployment, { workflow_id: workflowId, status: 'active' });
      if (deployment) {
        throw new AppError(
          'workflow_in_use',
          `The workflow ${quoted(workflow.name)} is deployed as "${deployment.deployment_name}" in the environment "${deployment.environment}". Stop or delete that deployment first.`,
        );
      }
      await manager.delete(Workflow, { workflow_id: workflowId });
    });
  }
}

/** The error for an id that no workflow has, be it a UUID or not. */
export function notFound(workflowId: string): AppError {
  return new AppError('workflow_not_found', `There is no workflow with the id ${quoted(workflowId)}.`);
}

function versionTaken(name: string, version: string): AppError {
  return new AppError(
    'workflow_exists',
    `The workflow ${quoted(name)} has a version "${version}" already. Choose another version, or leave it out to get the next number.`,
  );
}

function isUniqueViolation(error: unknown): boolean {
  return (
    error instanceof QueryFailedError &&
    'code' in error.driverError &&
    error.driverError.code === UNIQUE_VIOLATION
  );
}

import { Injectable } from '@nestjs/common';
import { InjectRepository } from '@nestjs/typeorm';
import { Pool } from 'pg';
import { Repository } from 'typeorm';
import { validate as isUuid } from 'uuid';
import { Execution } from '../database/entities/execution.entity.js';
import { Step } from '../database/entities/step.entity.js';
import { DeploymentsService } from '../deployments/deployments.service.js';
import { AppError } from '../errors.js';
import { isRequestOf } from './executions.acceptance.js';
import { ExecutionDto, StepDto } from './executions.dto.js';
import { ExecutionsList } from './executions.list.js';
import { IS_COMPLETED } from './status.js';
import { Subscribers } from './subscribers.js';
import type {
  ExecuteDto,
  ExecutionPageDto,
  ListExecutionsDto,
  ProgressDto,
  StepListDto,
} from './executions.dto.js';

/** How far an execution's log goes: `last_sequence` once it has ended, `stored_sequence` as far as its rows are kept. */
const POSITION = {
  name: 'execution-position',
  text: `
    SELECT status, last_sequence,
           (SELECT last_sequence FROM execution_chunk WHERE execution_id = $1
             ORDER BY first_sequence DESC LIMIT 1) AS stored_sequence
      FROM execution WHERE execution_id = $1`,
};

/** What is answered with the end of an execution. One that failed has no use for its text, which may be long. */
const RESULT = {
  name: 'execution-result',
  text: `
    SELECT execution_id, status, code, error, deployment_name, workflow_id, deployment_id, input_tokens, output_tokens,
           created_at, finished_at, CASE WHEN status ${IS_COMPLETED} THEN response END AS response
      FROM execution WHERE execution_id = $1`,
};

/** What {@link ExecutionsReader.result} finds. */
export type ExecutionResult = Pick<
  Execution,
  | 'execution_id'
  | 'status'
  | 'code'
  | 'error'
  | 'deployment_name'
  | 'workflow_id'
  | 'deployment_id'
  | 'input_tokens'
  | 'output_tokens'
  | 'created_at'
  | 'finished_at'
  | 'response'
>;

interface Position {
  status: Execution['status'];
  last_sequence: number | null;
  stored_sequence: number | null;
}

/** Where a stream goes on, and whether anything is left to send. */
export interface StreamStart {
  after: number;
  ended: boolean;
}

/** Answers questions about executions. */
@Injectable()
export class ExecutionsReader {
  constructor(
    private readonly pool: Pool,
    @InjectRepository(Execution) private readonly executions: Repository<Execution>,
    @InjectRepository(Step) private readonly allSteps: Repository<Step>,
    private readonly deployments: DeploymentsService,
    private readonly subscribers: Subscribers,
    private readonly allExecutions: ExecutionsList,
  ) {}

  /** Rejects with `execution_not_found`. */
  async find(executionId: string): Promise<Execution> {
    const execution = isUuid(executionId)
      ? await this.executions.findOneBy({ execution_id: executionId })
      : null;
    return execution ?? notFound();
  }

  async get(executionId: string): Promise<ExecutionDto> {
    const execution = await this.find(executionId);
    const presence = await this.subscribers.presence([execution.execution_id]);
    return ExecutionDto.from(execution, presence.get(execution.execution_id));
  }

  /** Newest first. A page may be shorter than asked; `next_cursor` says whether there is more. */
  async list(filter: ListExecutionsDto): Promise<ExecutionPageDto> {
    const { rows, next } = await this.allExecutions.page(filter);
    const presence = await this.subscribers.presence(rows.map((row) => row.execution_id));
    const items = rows.map((row) => ExecutionDto.from(row, presence.get(row.execution_id)));
    return { items, next_cursor: next };
  }

  /** The end of an execution, with its response if it is completed. Rejects with `execution_not_found`. */
  async result(executionId: string): Promise<ExecutionResult> {
    const { rows } = await this.pool.query<ExecutionResult>({ ...RESULT, values: [executionId] });
    return rows[0] ?? notFound();
  }

  async steps(executionId: string): Promise<StepListDto> {
    await this.state(executionId);
    const rows = await this.allSteps.find({
      where: { execution_id: executionId },
      order: { started_at: { direction: 'ASC', nulls: 'LAST' }, step_id: 'ASC' },
    });
    return { items: rows.map((row) => StepDto.from(row)) };
  }

  async progress(executionId: string): Promise<ProgressDto> {
    const { status, revision_id } = await this.state(executionId);
    const [total, steps] = await Promise.all([
      this.deployments.countSteps(revision_id),
      // Without the outputs: this is asked for again and again.
      this.allSteps.find({
        where: { execution_id: executionId },
        select: { agent_id: true, status: true },
        order: { started_at: 'ASC' },
      }),
    ]);
    const running = steps.filter((step) => step.status === 'running');
    const completed = steps.length - running.length;
    return {
      execution_id: executionId,
      status,
      completed_steps: completed,
      total_steps: total,
      progress: completed / total,
      running_agents: running.map((step) => step.agent_id),
    };
  }

  /** What there is to know without reading what the execution was asked and said. */
  private async state(executionId: string): Promise<Pick<Execution, 'status' | 'revision_id'>> {
    const state = isUuid(executionId)
      ? await this.executions.findOne({
          where: { execution_id: executionId },
          select: { status: true, revision_id: true },
        })
      : null;
    return state ?? notFound();
  }

  /**
   * Finds the execution that a repeated request began before, by the id of the last event that its client has. Rejects
   * with `execution_not_found`, and with `invalid_cursor` if the event belongs to another request.
   */
  async findRepeated(request: ExecuteDto, lastEventId: string): Promise<string> {
    const execution = await this.find(parseEventId(lastEventId).id);
    if (isRequestOf(execution, request)) return execution.execution_id;
    throw new AppError(
      'invalid_cursor',
      'Last-Event-ID belongs to an execution of another request. Leave the header out to begin a new one.',
    );
  }

  /**
   * Checks where a client wants to go on: `lastEventId` is the `<execution_id>:<sequence>` of an event, and wins over
   * `after`, since a browser repeats the URL unchanged. Rejects with `execution_not_found`, `invalid_cursor` (not such an
   * id, of another execution, or past the end) or `log_expired`.
   */
  async streamStart(
    executionId: string,
    from: { lastEventId?: string; after?: number },
  ): Promise<StreamStart> {
    if (!isUuid(executionId)) notFound();
    const { rows } = await this.pool.query<Position>({ ...POSITION, values: [executionId] });
    const position = rows[0] ?? notFound();
    const end = position.last_sequence ?? position.stored_sequence ?? 0;
    const cursor = cursorOf(from, { id: executionId.toLowerCase(), end });
    const ended = position.last_sequence !== null && cursor === position.last_sequence;
    if (!ended && position.last_sequence !== null && position.stored_sequence === null) {
      throw new AppError('log_expired', `The result can still be read at /api/executions/${executionId}.`);
    }
    return { after: cursor, ended };
  }
}

/** Where a client goes on in the stream `id`, which has `end` chunks so far. Throws `invalid_cursor`. */
export function cursorOf(
  { lastEventId, after = 0 }: { lastEventId?: string; after?: number },
  { id, end }: { id: string; end: number },
): number {
  const event = lastEventId ? parseEventId(lastEventId) : { id, position: after };
  if (event.id !== id) throw new AppError('invalid_cursor', 'Last-Event-ID belongs to another stream.');
  if (event.position <= end) return event.position;
  throw new AppError(
    'invalid_cursor',
    `The stream has ${end} chunks so far, so it can't go on after ${event.position}.`,
  );
}

/** The id of an event of a stream: which stream it is of, and where it is in it. Throws `invalid_cursor`. */
export function parseEventId(eventId: string): { id: string; position: number } {
  const [, id, position] = /^([0-9a-f-]{36}):(\d{1,10})$/i.exec(eventId) ?? [];
  if (!id || !position) {
    throw new AppError(
      'invalid_cursor',
      'Last-Event-ID must be the id of an event: <execution_id>:<sequence>, or <batch_id>:<position> of a batch.',
    );
  }
  return { id: id.toLowerCase(), position: Number(position) };
}

function notFound(): never {
  throw new AppError('execution_not_found', 'There is no execution with this id.');
}

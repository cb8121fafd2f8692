import { Injectable } from '@nestjs/common';
import { InjectRepository } from '@nestjs/typeorm';
import { Pool } from 'pg';
import { MoreThanOrEqual, Repository } from 'typeorm';
import { validate as isUuid } from 'uuid';
import { Batch } from '../database/entities/batch.entity.js';
import { Execution } from '../database/entities/execution.entity.js';
import { AppError } from '../errors.js';
import { toJson } from '../event-log/chunk.js';
import { MergedLog } from '../event-log/merged-log.js';
import { cursorOf } from '../executions/executions.reader.js';
import type { StreamStart } from '../executions/executions.reader.js';
import { countOf } from './batch-progress.js';
import { BatchDto, BatchResultDto } from './batches.dto.js';
import type { BatchQueryDto } from './batches.dto.js';

/** Items that are read at once for the results. */
const RESULTS_PAGE = 20;

/** Answers questions about batches. */
@Injectable()
export class BatchesReader {
  constructor(
    private readonly pool: Pool,
    private readonly log: MergedLog,
    @InjectRepository(Batch) private readonly batches: Repository<Batch>,
    @InjectRepository(Execution) private readonly executions: Repository<Execution>,
  ) {}

  /** Rejects with `batch_not_found`. */
  async find(batchId: string): Promise<Batch> {
    const batch = isUuid(batchId) ? await this.batches.findOneBy({ batch_id: batchId }) : null;
    if (batch) return batch;
    throw new AppError('batch_not_found', 'There is no batch with this id.');
  }

  /** The batch and a page of its items. */
  async get(batchId: string, { limit, cursor = 0 }: BatchQueryDto): Promise<BatchDto> {
    const batch = await this.find(batchId);
    const [{ rows: statuses }, items] = await Promise.all([
      this.pool.query<Pick<Execution, 'status'>>('SELECT status FROM execution WHERE batch_id = $1', [
        batchId,
      ]),
      this.page(batchId, cursor, limit + 1),
    ]);
    return BatchDto.from(batch, {
      counts: countOf(statuses),
      items: items.slice(0, limit),
      next_cursor: items.length > limit ? String(cursor + limit) : undefined,
    });
  }

  /** Lines of JSON, one for each item in the order of the request, as they are now; most are read as they are asked for. */
  async results(batchId: string): Promise<AsyncIterable<string>> {
    const { batch_id } = await this.find(batchId);
    const pages = this.pages(batch_id);
    const first = await pages.next(); // so that a database that is away can be told with a status
    return (async function* () {
      for (let page = first; !page.done; page = await pages.next()) {
        yield page.value.map((item) => `${toJson(item)}\n`).join('');
      }
    })();
  }

  /**
   * Checks where a client wants to go on in the merged stream, as the executions' streams do: `lastEventId` is the
   * `<batch_id>:<position>` of an event, and wins over `after`. Rejects with `batch_not_found`, `invalid_cursor` or `log_expired`.
   */
  async streamStart(batchId: string, from: { lastEventId?: string; after?: number }): Promise<StreamStart> {
    const batch = await this.find(batchId);
    const end = await this.log.end(batch.batch_id);
    const cursor = cursorOf(from, { id: batch.batch_id, end: end.position });
    const ended = end.isFinal && cursor === end.position;
    if (!ended && batch.log_deleted_at) {
      throw new AppError('log_expired', `The results can still be read at /api/batches/${batchId}/results.`);
    }
    return { after: cursor, ended };
  }

  private async *pages(batchId: string): AsyncGenerator<BatchResultDto[], void, void> {
    for (let from = 0; ; from += RESULTS_PAGE) {
      const page = await this.page(batchId, from, RESULTS_PAGE);
      if (page.length > 0) yield page;
      if (page.length < RESULTS_PAGE) return;
    }
  }

  private async page(batchId: string, from: number, limit: number): Promise<BatchResultDto[]> {
    const rows = await this.executions.find({
      where: { batch_id: batchId, batch_index: MoreThanOrEqual(from) },
      order: { batch_index: 'ASC' },
      take: limit,
    });
    return rows.map((row) => BatchResultDto.from(row));
  }
}

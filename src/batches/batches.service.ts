import { Injectable } from '@nestjs/common';
import { Pool } from 'pg';
import { validate as isUuid } from 'uuid';
import type { Batch } from '../database/entities/batch.entity.js';
import { AppError } from '../errors.js';
import { IS_RUNNING } from '../executions/status.js';
import { untilFinal } from '../executions/until-final.js';
import { BatchProgress } from './batch-progress.js';
import { BatchQueryDto } from './batches.dto.js';
import type { BatchDto } from './batches.dto.js';
import { BatchesReader } from './batches.reader.js';

const REQUEST_CANCEL = {
  name: 'batch-request-cancel',
  text: `
    UPDATE batch SET cancel_requested_at = coalesce(cancel_requested_at, now())
     WHERE batch_id = $1 AND status ${IS_RUNNING} RETURNING batch_id`,
};

const STATUS = { name: 'batch-status', text: 'SELECT status FROM batch WHERE batch_id = $1' };

/** Cancels batches. */
@Injectable()
export class BatchesService {
  constructor(
    private readonly pool: Pool,
    private readonly progress: BatchProgress,
    private readonly reader: BatchesReader,
  ) {}

  /**
   * Ends a batch as `cancelled`, and all of its items that have not ended. Answers when they have, so that no step begins after
   * that; or after a moment, if a worker that runs one does not answer. Cancelling again changes nothing. Rejects with
   * `batch_finished` once it is completed, and with `batch_not_found`.
   */
  async cancel(batchId: string): Promise<BatchDto> {
    const requested = isUuid(batchId)
      ? await this.pool.query({ ...REQUEST_CANCEL, values: [batchId] })
      : undefined;
    if (requested?.rowCount === 1) {
      await untilFinal(async () => {
        await this.progress.advance(batchId);
        const { rows } = await this.pool.query<Pick<Batch, 'status'>>({ ...STATUS, values: [batchId] });
        return rows[0]?.status !== 'running';
      });
    }
    const batch = await this.reader.get(batchId, new BatchQueryDto());
    if (batch.status === 'completed') {
      throw new AppError('batch_finished', 'The batch was completed before.');
    }
    return batch;
  }
}

import { Injectable } from '@nestjs/common';
import type { Execution } from '../database/entities/execution.entity.js';
import { SlowPool } from '../database/slow-pool.js';
import type { ListExecutionsDto } from './executions.dto.js';
import { IS_UNFINISHED, isFinal } from './status.js';

/** Executions that one statement looks at; whether they pass the filter is found out one by one. */
const LOOKED_AT = 20_000;
/** Such statements for one page, which is then shorter. */
const MOST_PIECES = 5;
/** How far the time in an id may be from `created_at`: a clock may have been set back. */
const CLOCK_MARGIN_MS = 86_400_000;
const LAST_ID_MS = 2 ** 48 - 1;

/** $1 to $7: what is asked for; a parameter that is null does not filter. */
const PASSES = `
  ($1::text IS NULL OR deployment_name = $1) AND ($2::text IS NULL OR environment = $2)
  AND ($3::uuid IS NULL OR workflow_id = $3) AND ($4::uuid IS NULL OR batch_id = $4)
  AND ($5::text IS NULL OR status = $5)
  AND ($6::timestamptz IS NULL OR created_at >= $6) AND ($7::timestamptz IS NULL OR created_at < $7)`;

/** Of the executions below an id ($8) and from another one on ($9), the newest {@link LOOKED_AT}; of these the first $10 that pass. */
const PIECE = `
  SELECT * FROM (
    SELECT * FROM execution WHERE execution_id < $8 AND execution_id >= $9
     ORDER BY execution_id DESC LIMIT ${LOOKED_AT}) AS piece
   WHERE ${PASSES} ORDER BY execution_id DESC LIMIT $10`;

/** The last id of a piece; nothing if no execution is left after it. */
const LAST_OF_PIECE = `
  SELECT execution_id FROM execution WHERE execution_id < $1 AND execution_id >= $2
   ORDER BY execution_id DESC OFFSET ${LOOKED_AT - 1} LIMIT 1`;

/** For what an index finds: the items of a batch, and executions that have not ended. */
const found = (condition: string) => `
  WITH found AS MATERIALIZED (
    SELECT * FROM execution WHERE ${condition} AND execution_id < $8 AND execution_id >= $9 AND ${PASSES})
  SELECT * FROM found ORDER BY execution_id DESC LIMIT $10`;
const OF_BATCH = found('batch_id = $4::uuid');
const UNFINISHED = found(`status ${IS_UNFINISHED}`);

/** Rows of a page, and the id after which the next one begins; absent if there is none. */
export interface ListedExecutions {
  rows: Execution[];
  next?: string;
}

/**
 * Lists executions, the newest first. Ids ascend with time, so the page before and a period are bounds of the primary key; for
 * the other filters a bounded number of executions is looked at, and a page may be shorter than asked, or empty, with a `next`.
 */
@Injectable()
export class ExecutionsList {
  constructor(private readonly pool: SlowPool) {}

  /** Rejects as {@link SlowPool.ask} does. */
  async page(filter: ListExecutionsDto): Promise<ListedExecutions> {
    const { deployment_name, environment, workflow_id, batch_id, status, from, to, limit, cursor } = filter;
    // As moments: PostgreSQL reads fewer offsets from UTC than RFC 3339 has.
    const moments = [from, to].map((moment) => (moment === undefined ? undefined : new Date(moment)));
    const passes = [deployment_name, environment, workflow_id, batch_id, status, ...moments];
    const lowest = idAt(from === undefined ? 0 : Date.parse(from) - CLOCK_MARGIN_MS);
    const newest = idAt(to === undefined ? LAST_ID_MS : Date.parse(to) + CLOCK_MARGIN_MS);
    const below = cursor !== undefined && cursor.toLowerCase() < newest ? cursor.toLowerCase() : newest;
    const isIndexed = batch_id !== undefined || (status !== undefined && !isFinal(status));
    if (isIndexed) {
      const text = batch_id === undefined ? UNFINISHED : OF_BATCH;
      return pageOf(await this.ask(text, [...passes, below, lowest, limit + 1]), limit);
    }
    return this.look(passes, { below, lowest, limit });
  }

  private async look(
    passes: unknown[],
    { below, lowest, limit }: { below: string; lowest: string; limit: number },
  ): Promise<ListedExecutions> {
    const rows: Execution[] = [];
    let next: string | undefined = below;
    for (let piece = 0; piece < MOST_PIECES; piece++) {
      rows.push(...(await this.ask(PIECE, [...passes, next, lowest, limit + 1 - rows.length])));
      if (rows.length > limit) return pageOf(rows, limit);
      next = (await this.ask(LAST_OF_PIECE, [next, lowest]))[0]?.execution_id;
      if (next === undefined) return { rows };
    }
    return { rows, next };
  }

  private async ask(text: string, values: unknown[]): Promise<Execution[]> {
    return (await this.pool.ask<Execution>({ text, values })).rows;
  }
}

function pageOf(rows: Execution[], limit: number): ListedExecutions {
  const page = rows.slice(0, limit);
  return { rows: page, next: rows.length > limit ? page.at(-1)?.execution_id : undefined };
}

/** The lowest UUID of version 7 of a moment, ms since 1970 (RFC 9562, section 5.7). */
function idAt(ms: number): string {
  const time = Math.min(Math.max(ms, 0), LAST_ID_MS).toString(16).padStart(12, '0');
  const rest = ms >= LAST_ID_MS ? 'ffff-ffff-ffffffffffff' : '0000-0000-000000000000';
  return `${time.slice(0, 8)}-${time.slice(8)}-${rest}`;
}

import { Injectable } from '@nestjs/common';
import { Pool } from 'pg';
import type { Deployment } from '../database/entities/deployment.entity.js';
import { queryAtLength } from '../database/query-at-length.js';
import { AppError } from '../errors.js';
import type {
  PercentilesDto,
  StatisticsBucketDto,
  StatisticsDto,
  StatisticsQueryDto,
} from './deployments.dto.js';
import { DeploymentsService } from './deployments.service.js';

const MOST_BUCKETS = 1500;
const DEFAULT_BUCKETS = 60;
/** Every day of UTC has as many: leap seconds are not counted (POSIX, "Seconds Since the Epoch"). */
const BUCKET_MS = { minute: 60_000, hour: 3_600_000, day: 86_400_000 };

/**
 * The totals and each step of the series in one pass, so that they are of one moment. Executions of the totals that
 * ended before the series share the row whose `bucket_start` is null.
 */
const STATISTICS = `
  SELECT grouping(bucket_start) = 1 AS is_total, bucket_start,
         count(*)::int AS execution_count,
         (count(*) FILTER (WHERE status = 'completed'))::int AS success_count,
         (count(*) FILTER (WHERE status = 'error'))::int AS error_count,
         (count(*) FILTER (WHERE status = 'cancelled'))::int AS cancelled_count,
         max(finished_at) AS last_executed_at,
         percentile_cont(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY duration_ms)
           FILTER (WHERE status <> 'cancelled') AS duration_ms,
         percentile_cont(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY time_to_first_chunk_ms) AS time_to_first_chunk_ms,
         coalesce(sum(input_tokens), 0)::float8 AS input_tokens,
         coalesce(sum(output_tokens), 0)::float8 AS output_tokens
    FROM (SELECT status, finished_at, input_tokens, output_tokens,
                 CASE WHEN finished_at >= $4 THEN date_trunc($5, finished_at, 'UTC') END AS bucket_start,
                 extract(epoch FROM finished_at - created_at)::float8 * 1000 AS duration_ms,
                 extract(epoch FROM first_chunk_at - created_at)::float8 * 1000 AS time_to_first_chunk_ms
            FROM execution
           WHERE deployment_id = $1 AND finished_at IS NOT NULL
             AND ($2::timestamptz IS NULL OR finished_at >= $2) AND ($3::timestamptz IS NULL OR finished_at < $3)) AS ended
   GROUP BY GROUPING SETS ((), (bucket_start))`;

const LAST_ERROR = `
  SELECT error AS last_error, finished_at AS last_error_at
    FROM execution
   WHERE deployment_id = $1 AND status = 'error'
     AND ($2::timestamptz IS NULL OR finished_at >= $2) AND ($3::timestamptz IS NULL OR finished_at < $3)
   ORDER BY finished_at DESC LIMIT 1`;

type Counts = Pick<Deployment, 'execution_count' | 'success_count' | 'error_count' | 'cancelled_count'>;

interface StatisticsRow extends Counts {
  is_total: boolean;
  bucket_start: Date | null;
  last_executed_at: Date | null;
  /** p50, p95 and p99 in ms, null without a sample. */
  duration_ms: number[] | null;
  time_to_first_chunk_ms: number[] | null;
  input_tokens: number;
  output_tokens: number;
}

type LastError = Pick<Deployment, 'last_error' | 'last_error_at'>;

/** Which executions are counted, and the starts of the series' steps in ms since 1970, oldest first. */
interface Period {
  from?: Date;
  to?: Date;
  starts: number[];
}

/** Computes statistics from the executions that have ended. */
@Injectable()
export class StatisticsService {
  constructor(
    private readonly pool: Pool,
    private readonly deployments: DeploymentsService,
  ) {}

  /**
   * Without `from` and `to` the counters are the deployment's own. Rejects with `deployment_not_found`, and with
   * `validation_failed` for a period that is empty or has too many steps.
   */
  async statistics(deploymentName: string, query: StatisticsQueryDto): Promise<StatisticsDto> {
    const now = new Date();
    const period = toPeriod(query, now);
    const deployment = await this.deployments.find(deploymentName, query.environment);
    const { deployment_id, deployment_name, environment } = deployment;
    const rows = await this.aggregate(deployment_id, period, query.bucket);
    const total = rows.find((row) => row.is_total) ?? NO_EXECUTIONS;
    const isBounded = period.from !== undefined || period.to !== undefined;
    const counts = isBounded
      ? { ...total, ...(await this.lastError(deployment_id, period, total)) }
      : deployment;
    return {
      deployment_id,
      deployment_name,
      environment,
      from: period.from,
      to: period.to ?? now,
      ...toCounts(counts),
      error_rate: counts.execution_count === 0 ? 0 : counts.error_count / counts.execution_count,
      last_executed_at: counts.last_executed_at ?? undefined,
      last_error: counts.last_error_at
        ? { message: counts.last_error ?? '', at: counts.last_error_at }
        : undefined,
      duration_ms: toPercentiles(total.duration_ms),
      time_to_first_chunk_ms: toPercentiles(total.time_to_first_chunk_ms),
      usage: { input_tokens: total.input_tokens, output_tokens: total.output_tokens },
      series: toSeries(period.starts, rows),
    };
  }

  private async aggregate(
    deploymentId: string,
    { from, to, starts }: Period,
    bucket: string,
  ): Promise<StatisticsRow[]> {
    const [seriesFrom = 0] = starts;
    const values = [deploymentId, from, to, new Date(seriesFrom), bucket];
    return (await queryAtLength<StatisticsRow>(this.pool, { text: STATISTICS, values })).rows;
  }

  /** Looked for only where there is one: otherwise the search would pass all executions. */
  private async lastError(
    deploymentId: string,
    { from, to }: Period,
    { error_count }: Counts,
  ): Promise<LastError> {
    const none: LastError = { last_error: null, last_error_at: null };
    if (error_count === 0) return none;
    const values = [deploymentId, from, to];
    const { rows } = await queryAtLength<LastError>(this.pool, { text: LAST_ERROR, values });
    return rows[0] ?? none;
  }
}

const NO_EXECUTIONS: StatisticsRow = {
  is_total: true,
  bucket_start: null,
  execution_count: 0,
  success_count: 0,
  error_count: 0,
  cancelled_count: 0,
  last_executed_at: null,
  duration_ms: null,
  time_to_first_chunk_ms: null,
  input_tokens: 0,
  output_tokens: 0,
};

function toPeriod(query: StatisticsQueryDto, now: Date): Period {
  const from = query.from === undefined ? undefined : new Date(query.from);
  const to = query.to === undefined ? undefined : new Date(query.to);
  const step = BUCKET_MS[query.bucket];
  // The end of a period does not belong to it, the present moment does.
  const last = Math.floor((to ? to.getTime() - 1 : now.getTime()) / step) * step;
  const first = from ? Math.floor(from.getTime() / step) * step : last - (DEFAULT_BUCKETS - 1) * step;
  if (from && from >= (to ?? now)) refuse('from', `must be before ${to ? 'to' : 'now'}`);
  const count = (last - first) / step + 1;
  if (count > MOST_BUCKETS) {
    const advice = 'Choose a longer bucket or a shorter period';
    refuse('bucket', `gives ${count} steps in this period, and ${MOST_BUCKETS} are possible. ${advice}`);
  }
  return { from, to, starts: Array.from({ length: count }, (_, index) => first + index * step) };
}

function refuse(parameter: string, detail: string): never {
  throw new AppError('validation_failed', `${parameter} ${detail}.`, {
    faults: [{ pointer: `/${parameter}`, detail }],
  });
}

function toSeries(starts: number[], rows: StatisticsRow[]): StatisticsBucketDto[] {
  const byStart = new Map(rows.map((row) => [row.bucket_start?.getTime(), row]));
  return starts.map((start) => {
    const row = byStart.get(start) ?? NO_EXECUTIONS;
    const { p50, p95 } = toPercentiles(row.duration_ms);
    const { input_tokens, output_tokens } = row;
    return {
      bucket_start: new Date(start),
      ...toCounts(row),
      duration_ms: { p50, p95 },
      input_tokens,
      output_tokens,
    };
  });
}

function toCounts({ execution_count, success_count, error_count, cancelled_count }: Counts): Counts {
  return { execution_count, success_count, error_count, cancelled_count };
}

/** Moments are kept in whole ms; a tenth is what interpolation adds. */
function toPercentiles(values: number[] | null): PercentilesDto {
  const [p50, p95, p99] = (values ?? []).map((value) => Math.round(value * 10) / 10);
  return { p50, p95, p99 };
}

import { Injectable } from '@nestjs/common';
import type { Deployment } from '../database/entities/deployment.entity.js';
import { SlowPool } from '../database/slow-pool.js';
import type {
  PercentilesDto,
  StatisticsBucketDto,
  StatisticsDto,
  StatisticsQueryDto,
} from './deployments.dto.js';
import { DeploymentsService } from './deployments.service.js';
import { segmentsOf, toPeriod } from './statistics.period.js';
import type { Period, Segment } from './statistics.period.js';
import { FAILURE_AT, STATISTICS } from './statistics.statements.js';

type Counts = Pick<Deployment, 'execution_count' | 'success_count' | 'error_count' | 'cancelled_count'>;

interface StatisticsRow extends Counts {
  is_total: boolean;
  /** Start of a step; null in the row of the totals, and in that of what was before the series. */
  step: Date | null;
  last_executed_at: Date | null;
  last_error_at: Date | null;
  /** p50, p95 and p99 in ms, null without a sample. */
  duration_ms: number[] | null;
  time_to_first_chunk_ms: number[] | null;
  input_tokens: number;
  output_tokens: number;
}

/** Answers how the executions went that have ended, from what is summed up of each minute, hour and day. */
@Injectable()
export class StatisticsService {
  constructor(
    private readonly pool: SlowPool,
    private readonly deployments: DeploymentsService,
  ) {}

  /**
   * Without `from` and `to` the counters are the deployment's own. Percentiles are within 2 % of the exact ones. Rejects with
   * `deployment_not_found`, with `validation_failed` for a period that is empty or has too many steps, and as {@link SlowPool.ask}.
   */
  async statistics(deploymentName: string, query: StatisticsQueryDto): Promise<StatisticsDto> {
    const now = new Date();
    const period = toPeriod(query, now);
    const deployment = await this.deployments.find(deploymentName, query.environment);
    const { deployment_id, deployment_name, environment } = deployment;
    const rows = await this.aggregate(deployment_id, period, query.bucket, now);
    const total = rows.find((row) => row.is_total) ?? NO_EXECUTIONS;
    const isBounded = period.from !== undefined || period.to !== undefined;
    const counts = isBounded
      ? { ...total, last_error: await this.lastError(deployment_id, total) }
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
    period: Period,
    bucket: StatisticsQueryDto['bucket'],
    now: Date,
  ): Promise<StatisticsRow[]> {
    const segments = segmentsOf(period, bucket, now);
    const [seriesFrom = 0] = period.starts;
    const values = [deploymentId, ...columnsOf(segments), new Date(seriesFrom), bucket];
    return (await this.pool.ask<StatisticsRow>({ text: STATISTICS, values })).rows;
  }

  private async lastError(deploymentId: string, { last_error_at }: StatisticsRow): Promise<string | null> {
    if (!last_error_at) return null;
    const { rows } = await this.pool.ask<{ error: string | null }>({
      ...FAILURE_AT,
      values: [deploymentId, last_error_at],
    });
    return rows[0]?.error ?? null;
  }
}

const NO_EXECUTIONS: StatisticsRow = {
  is_total: true,
  step: null,
  execution_count: 0,
  success_count: 0,
  error_count: 0,
  cancelled_count: 0,
  last_executed_at: null,
  last_error_at: null,
  duration_ms: null,
  time_to_first_chunk_ms: null,
  input_tokens: 0,
  output_tokens: 0,
};

/** As the arrays of one column each that the statement takes. */
function columnsOf(segments: Segment[]): unknown[] {
  const moment = (at: number) => {
    if (Number.isFinite(at)) return new Date(at).toISOString();
    return at > 0 ? 'infinity' : '-infinity';
  };
  return [
    segments.map(({ granularity }) => granularity),
    segments.map(({ first }) => moment(first)),
    segments.map(({ past }) => moment(past)),
  ];
}

function toSeries(starts: number[], rows: StatisticsRow[]): StatisticsBucketDto[] {
  const byStart = new Map(rows.map((row) => [row.step?.getTime(), row]));
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

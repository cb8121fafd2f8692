import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import request from 'supertest';
import { v7 as uuidv7 } from 'uuid';
import { startTestApp } from '../support/app.js';
import type { TestApp } from '../support/app.js';
import { DeploymentRoutes } from '../support/deployments.js';

let server: TestApp;
let routes: DeploymentRoutes;

beforeAll(async () => {
  server = await startTestApp();
  routes = new DeploymentRoutes(server.url);
});
afterAll(() => server.close());

describe('statistics', () => {
  interface Sample {
    status: 'completed' | 'error' | 'cancelled' | 'running';
    /** Offset of the end, in ms, from the series' begin. */
    at: number;
    duration: number;
    first?: number;
  }
  const BEGIN = Date.parse('2026-03-01T00:00:00Z');
  const HOUR = 3_600_000;

  /** A deployment with these executions, and with counters that only the deployment's own row can be the source of. */
  async function withSamples(samples: Sample[]): Promise<string> {
    const deployment = await routes.deployed();
    for (const [index, { status, at, duration, first }] of samples.entries()) {
      const end = BEGIN + at;
      await server.database.query(
        `INSERT INTO execution (execution_id, deployment_id, deployment_name, environment, workflow_id, revision_id, status,
                                input, error, input_tokens, output_tokens, created_at, first_chunk_at, finished_at)
         VALUES ($1, $2, $3, $4, $5, $6, $7, '{}', $8, 10, 2, $9, $10, $11)`,
        [
          uuidv7(),
          deployment.deployment_id,
          deployment.deployment_name,
          deployment.environment,
          deployment.workflow_id,
          deployment.revision_id,
          status,
          status === 'error' ? `failure ${index}` : null,
          new Date(end - duration),
          first === undefined ? null : new Date(end - duration + first),
          status === 'running' ? null : new Date(end),
        ],
      );
    }
    return deployment.deployment_name;
  }

  const SAMPLES: Sample[] = [
    { status: 'completed', at: 0, duration: 100, first: 10 },
    { status: 'completed', at: HOUR - 1, duration: 300, first: 30 },
    { status: 'error', at: HOUR, duration: 200, first: 20 },
    { status: 'error', at: HOUR + 1, duration: 400 },
    { status: 'cancelled', at: 3 * HOUR, duration: 9000, first: 40 },
    { status: 'running', at: 3 * HOUR, duration: 0 },
  ];

  const statistics = async (name: string, query: object = {}) =>
    (await request(server.url).get(`/api/deployments/${name}/statistics`).query(query).expect(200)).body as {
      series: { bucket_start: string; execution_count: number }[];
    };

  it('counts each execution once, in the hour of its end', async () => {
    const name = await withSamples(SAMPLES);
    const result = await statistics(name, { from: '2026-03-01', to: '2026-03-01T04:00:00Z', bucket: 'hour' });
    expect(result).toEqual({
      deployment_id: expect.any(String),
      deployment_name: name,
      environment: 'production',
      from: '2026-03-01T00:00:00.000Z',
      to: '2026-03-01T04:00:00.000Z',
      execution_count: 5,
      success_count: 2,
      error_count: 2,
      cancelled_count: 1,
      error_rate: 0.4,
      last_executed_at: '2026-03-01T03:00:00.000Z',
      last_error: { message: 'failure 3', at: '2026-03-01T01:00:00.001Z' },
      duration_ms: { p50: 250, p95: 385, p99: 397 },
      time_to_first_chunk_ms: { p50: 25, p95: 38.5, p99: 39.7 },
      usage: { input_tokens: 50, output_tokens: 10 },
      series: [
        step(0, { execution_count: 2, success_count: 2, duration_ms: { p50: 200, p95: 290 } }),
        step(1, { execution_count: 2, error_count: 2, duration_ms: { p50: 300, p95: 390 } }),
        step(2, { execution_count: 0 }),
        step(3, { execution_count: 1, cancelled_count: 1 }),
      ],
    });
  });

  function step(hour: number, fields: { execution_count: number; [field: string]: unknown }) {
    return {
      bucket_start: new Date(BEGIN + hour * HOUR).toISOString(),
      success_count: 0,
      error_count: 0,
      cancelled_count: 0,
      duration_ms: {},
      input_tokens: 10 * fields.execution_count,
      output_tokens: 2 * fields.execution_count,
      ...fields,
    };
  }

  it('includes the begin of a period and not its end', async () => {
    const name = await withSamples(SAMPLES);
    const bounds = (from: number, to: number) => ({
      from: new Date(BEGIN + from).toISOString(),
      to: new Date(BEGIN + to).toISOString(),
    });
    expect(await statistics(name, bounds(0, 1))).toMatchObject({
      execution_count: 1,
      last_executed_at: new Date(BEGIN).toISOString(),
    });
    expect(await statistics(name, bounds(HOUR - 1, HOUR))).toMatchObject({
      execution_count: 1,
      error_count: 0,
    });
    expect((await statistics(name, bounds(HOUR - 1, HOUR))).series).toHaveLength(1);
    expect((await statistics(name, bounds(HOUR - 1, HOUR + 1))).series).toHaveLength(2);
    const withOffset = { from: '2026-03-01T02:00:00+02:00', to: '2026-02-28T22:00-02:01' };
    expect(await statistics(name, withOffset)).toMatchObject({ ...bounds(0, 60_000), execution_count: 1 });
    expect(await statistics(name, bounds(1, HOUR - 1))).toEqual(
      expect.not.objectContaining({ last_error: expect.anything(), last_executed_at: expect.anything() }),
    );
  });

  it('gives the whole deployment and the last 60 steps when nothing is asked for', async () => {
    const name = await withSamples(SAMPLES);
    await server.database.query(
      `UPDATE deployment SET execution_count = 8, success_count = 4, error_count = 2, cancelled_count = 2,
              last_executed_at = '2026-05-01T00:00:00Z', last_error = 'the last', last_error_at = '2026-04-01T00:00:00Z'
        WHERE deployment_name = $1`,
      [name],
    );
    for (const bucket of ['minute', 'hour', 'day'] as const) {
      const result = await statistics(name, { bucket });
      expect(result).toMatchObject({
        execution_count: 8,
        error_rate: 0.25,
        last_executed_at: '2026-05-01T00:00:00.000Z',
        last_error: { message: 'the last', at: '2026-04-01T00:00:00.000Z' },
        duration_ms: { p50: 250 },
        usage: { input_tokens: 50 },
      });
      expect(result).not.toHaveProperty('from');
      expect(result.series).toHaveLength(60);
      const starts = result.series.map(({ bucket_start }) => Date.parse(bucket_start));
      const width = { minute: 60_000, hour: HOUR, day: 24 * HOUR }[bucket];
      starts.forEach((start, index) => expect(start).toBe((starts[0] ?? 0) + index * width));
      expect((starts[0] ?? 1) % width).toBe(0);
    }
  });

  it('looks back from an end that was given', async () => {
    const name = await withSamples(SAMPLES);
    const result = await statistics(name, { to: '2026-03-01T01:00:00Z' });
    expect(result).toMatchObject({ execution_count: 2, to: '2026-03-01T01:00:00.000Z' });
    expect(result.series.at(-1)).toMatchObject({
      bucket_start: '2026-03-01T00:00:00.000Z',
      execution_count: 2,
    });
    expect(result.series).toHaveLength(60);
  });

  it('has no rate of nothing and no percentile without a sample', async () => {
    const { deployment_name } = await routes.deployed();
    const nothing = { execution_count: 0, error_rate: 0, duration_ms: {}, time_to_first_chunk_ms: {} };
    for (const query of [{}, { from: '2026-01-01', bucket: 'day' }, { to: '1000-01-01' }]) {
      const result = await statistics(deployment_name, query);
      expect(result).toMatchObject({ ...nothing, usage: { input_tokens: 0, output_tokens: 0 } });
      expect(result).not.toHaveProperty('last_error');
      expect(result).not.toHaveProperty('last_executed_at');
    }
  });

  it.each([
    'bucket=week',
    'bucket=',
    'from=yesterday',
    'from=2026-02-30',
    'from=2026-02-30T00:00:00Z',
    'from=2026-01-01T00:00:00',
    'from=2026-01-01T00:00:00+01:00',
    'from=2026-W01',
    'from=%00',
    'to=2026-01-01T25:00:00Z',
    'to=1',
    'from=2026-01-02&to=2026-01-01',
    'from=2026-01-01&to=2026-01-01',
    'from=9999-01-01',
    'from=2026-01-01T00:00:00Z&to=2026-01-02T01:00:01Z&bucket=minute',
    'from=2000-01-01',
  ])('answers ?%s with 400', async (query) => {
    const { deployment_name } = await routes.deployed();
    const path = `/api/deployments/${deployment_name}/statistics?${query}`;
    const response = await request(server.url).get(path).expect(400);
    expect(response.body).toMatchObject({ code: 'validation_failed', errors: [expect.anything()] });
  });

  it('takes 1,500 steps', async () => {
    const { deployment_name } = await routes.deployed();
    const day = { from: '2026-01-01T00:00:00Z', to: '2026-01-02T01:00:00Z', bucket: 'minute' };
    expect((await statistics(deployment_name, day)).series).toHaveLength(1500);
  });
});

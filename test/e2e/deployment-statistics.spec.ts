import { beforeAll, describe, expect, it } from '@jest/globals';
import request from 'supertest';
import { v7 as uuidv7 } from 'uuid';
import { RollUps } from '../../src/deployments/roll-ups.js';
import { DeploymentRoutes } from '../support/deployments.js';
import { IS_FULL } from '../support/effort.js';
import { withStudio } from '../support/with-studio.js';

// Nothing is added to the counters but by a test.
const server = withStudio({ env: { ROLE: 'api' } });
let routes: DeploymentRoutes;

beforeAll(async () => {
  routes = new DeploymentRoutes(server.url);
});

/** Where the executions are, that statistics are made of. */
const KEPT = [
  'in no roll-up yet',
  'in roll-ups',
  'older than roll-ups',
  'older than roll-ups, and backfilled',
] as const;

describe.each(IS_FULL ? KEPT : KEPT.slice(1, 3))('statistics of executions that are %s', (kept) => {
  interface Sample {
    status: 'completed' | 'error' | 'cancelled' | 'running';
    /** Offset of the end, in ms, from the series' begin. */
    at: number;
    duration: number;
    first?: number;
  }
  const BEGIN = Date.parse('2026-03-01T00:00:00Z');
  const HOUR = 3_600_000;

  const isOlder = kept.startsWith('older');

  /** A deployment with these executions. */
  async function withSamples(samples: Sample[]): Promise<string> {
    const deployment = await routes.deployed();
    const query = (text: string, values?: unknown[]) => server.database.query(text, values);
    for (const [index, { status, at, duration, first }] of samples.entries()) {
      const end = BEGIN + at;
      const id = uuidv7();
      const finishedAt = status === 'running' ? null : new Date(end);
      await query(
        `INSERT INTO execution (execution_id, deployment_id, deployment_name, environment, workflow_id, revision_id, status,
                                input, error, input_tokens, output_tokens, created_at, first_chunk_at, finished_at)
         VALUES ($1, $2, $3, $4, $5, $6, $7, '{}', $8, 10, 2, $9, $10, $11)`,
        [
          id,
          deployment.deployment_id,
          deployment.deployment_name,
          deployment.environment,
          deployment.workflow_id,
          deployment.revision_id,
          isOlder ? status : 'running',
          status === 'error' ? `failure ${index}` : null,
          new Date(end - duration),
          first === undefined ? null : new Date(end - duration + first),
          isOlder ? finishedAt : null,
        ],
      );
      if (isOlder || status === 'running') continue;
      await query('UPDATE execution SET status = $2, finished_at = $3 WHERE execution_id = $1', [
        id,
        status,
        finishedAt,
      ]);
    }
    const rollUps = server.app.get(RollUps);
    if (isOlder) {
      await query(`DELETE FROM statistics_backfill`);
      await query(`DELETE FROM execution_statistics`);
      await query(`INSERT INTO statistics_backfill VALUES ('ffffffff-ffff-ffff-ffff-ffffffffffff')`);
    }
    if (kept === 'in roll-ups') await rollUps.fold();
    if (kept === 'older than roll-ups, and backfilled') await rollUps.backfill();
    return deployment.deployment_name;
  }

  /** A percentile, which may be 2 % off. */
  const about = (exact: number): number =>
    ({
      asymmetricMatch: (value: unknown) => Math.abs(Number(value) - exact) <= exact * 0.02 + 0.05,
      toAsymmetricMatcher: () => `about ${exact}`,
    }) as unknown as number;

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
      duration_ms: { p50: about(250), p95: about(385), p99: about(397) },
      time_to_first_chunk_ms: { p50: about(25), p95: about(38.5), p99: about(39.7) },
      usage: { input_tokens: 50, output_tokens: 10 },
      series: [
        step(0, { execution_count: 2, success_count: 2, duration_ms: { p50: about(200), p95: about(290) } }),
        step(1, { execution_count: 2, error_count: 2, duration_ms: { p50: about(300), p95: about(390) } }),
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
      `WITH folding AS (SELECT set_config('agent_studio.folds_counters', 'on', true))
       UPDATE deployment SET execution_count = 8, success_count = 4, error_count = 2, cancelled_count = 2,
              last_executed_at = '2026-05-01T00:00:00Z', last_error = 'the last', last_error_at = '2026-04-01T00:00:00Z'
         FROM folding WHERE deployment_name = $1`,
      [name],
    );
    const added = kept === 'in no roll-up yet' ? { all: 5, errors: 2 } : { all: 0, errors: 0 };
    for (const bucket of ['minute', 'hour', 'day'] as const) {
      const result = await statistics(name, { bucket });
      expect(result).toMatchObject({
        execution_count: 8 + added.all,
        error_rate: (2 + added.errors) / (8 + added.all),
        last_executed_at: '2026-05-01T00:00:00.000Z',
        last_error: { message: 'the last', at: '2026-04-01T00:00:00.000Z' },
        duration_ms: { p50: about(250) },
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

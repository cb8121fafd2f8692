import { beforeAll, describe, expect, it } from '@jest/globals';
import fc from 'fast-check';
import { Client } from 'pg';
import { RELATIVE_ERROR } from '../../src/deployments/histogram.js';
import { RollUps } from '../../src/deployments/roll-ups.js';
import { BACKFILL } from '../../src/deployments/roll-ups.statements.js';
import { DeploymentRoutes } from '../support/deployments.js';
import type { Deployment } from '../support/deployments.js';
import { rounds } from '../support/effort.js';
import { forgetStatistics, insertExecutions } from '../support/ended-executions.js';
import type { EndedExecution } from '../support/ended-executions.js';
import { withStudio } from '../support/with-studio.js';

const DAY = Date.parse('2026-03-01T00:00:00Z');
const HOUR = 3_600_000;

interface Statistics {
  execution_count: number;
  success_count: number;
  error_count: number;
  cancelled_count: number;
  duration_ms: Record<string, number>;
  time_to_first_chunk_ms: Record<string, number>;
  series: { execution_count: number; duration_ms: Record<string, number> }[];
}

// Nothing is added to the statistics but by a test.
const server = withStudio({ env: { ROLE: 'api' } });
const { studio } = server;
let routes: DeploymentRoutes;
let rollUps: RollUps;

beforeAll(async () => {
  routes = new DeploymentRoutes(server.url);
  rollUps = server.app.get(RollUps);
});

const statistics = async ({ deployment_name }: Deployment, query = 'from=2026-03-01&to=2026-03-03') =>
  (await studio.json<Statistics>(`/api/deployments/${deployment_name}/statistics?${query}`)).body;

async function backfillAll(): Promise<void> {
  while ((await server.database.query('SELECT 1 FROM statistics_backfill')).length > 0)
    await rollUps.backfill();
}

/** As PostgreSQL's `percentile_cont` has it. */
function exact(values: number[], quantile: number): number {
  const sorted = values.toSorted((a, b) => a - b);
  const position = quantile * (sorted.length - 1);
  const low = sorted[Math.floor(position)] ?? NaN;
  const high = sorted[Math.ceil(position)] ?? NaN;
  return low + (high - low) * (position - Math.floor(position));
}

it('percentiles are within 2 % of the exact ones, whatever the durations are', async () => {
  const duration = fc.oneof(
    fc.integer({ min: 0, max: 20 }),
    fc.integer({ min: 1, max: 30_000 }),
    fc.integer({ min: 1, max: 2_000_000_000 }),
  );
  const run = fc.array(fc.record({ duration, first: fc.nat(1000), at: fc.nat(47) }), {
    minLength: 1,
    maxLength: 120,
  });
  await fc.assert(
    fc.asyncProperty(run, async (samples) => {
      const deployment = await routes.deployed();
      const executions = samples.map(({ duration: durationMs, first: firstChunkMs, at }) => ({
        status: 'completed',
        finishedAt: new Date(DAY + at * HOUR + 1),
        durationMs,
        firstChunkMs,
      }));
      await insertExecutions(server.database, deployment, executions);
      await forgetStatistics(server.database);
      await backfillAll();
      const answer = await statistics(deployment);
      const near = (values: number[], measured: Record<string, number>, names: string[]) => {
        for (const name of names) {
          const wanted = exact(values, Number(name.slice(1)) / 100);
          // A tenth of a ms is what the answer is rounded to.
          expect(Math.abs((measured[name] ?? NaN) - wanted)).toBeLessThanOrEqual(
            wanted * RELATIVE_ERROR + 0.051,
          );
        }
      };
      near(
        samples.map((sample) => sample.duration),
        answer.duration_ms,
        ['p50', 'p95', 'p99'],
      );
      near(
        samples.map((sample) => sample.first),
        answer.time_to_first_chunk_ms,
        ['p50', 'p95', 'p99'],
      );
      for (const [hour, step] of answer.series.entries()) {
        const values = samples.filter(({ at }) => at === hour).map((sample) => sample.duration);
        expect(step.execution_count).toBe(values.length);
        if (values.length > 0) near(values, step.duration_ms, ['p50', 'p95']);
      }
    }),
    { numRuns: rounds(12, 4) },
  );
});

describe('executions that ended before there were statistics', () => {
  const PER_DEPLOYMENT = 2500;

  function past(count: number): EndedExecution[] {
    return Array.from({ length: count }, (_, index) => ({
      status: (['completed', 'completed', 'error', 'cancelled'] as const)[index % 4] ?? 'completed',
      finishedAt: new Date(DAY + ((index * 7919) % (2 * 24 * HOUR))),
      durationMs: 10 + (index % 500),
    }));
  }

  it('are added once, however often that is interrupted, and statistics are right at each moment', async () => {
    const deployments = [await routes.deployed(), await routes.deployed()];
    for (const deployment of deployments)
      await insertExecutions(server.database, deployment, past(PER_DEPLOYMENT));
    const running = { status: 'running', finishedAt: null, durationMs: 5 };
    const [first] = deployments;
    if (!first) throw new Error('There is no deployment.');
    const late = await insertExecutions(server.database, first, [running, running, running]);
    await forgetStatistics(server.database);
    const expected = (ended: number) => ({
      execution_count: PER_DEPLOYMENT + ended,
      success_count: PER_DEPLOYMENT / 2 + ended,
      error_count: PER_DEPLOYMENT / 4,
      cancelled_count: PER_DEPLOYMENT / 4,
    });
    let ended = 0;
    const check = async () => {
      for (const deployment of deployments) {
        expect(await statistics(deployment)).toMatchObject(expected(deployment === first ? ended : 0));
      }
    };
    const end = async (id: string | undefined) => {
      await server.database.query(
        `UPDATE execution SET status = 'completed', finished_at = $2 WHERE execution_id = $1`,
        [id, new Date(DAY + HOUR)],
      );
      ended++;
      await check();
    };
    await check();
    await end(late[0]);
    // A process dies in the middle of a piece.
    const client = new Client({ connectionString: server.database.url });
    await client.connect();
    await client.query('BEGIN');
    const { rows } = await client.query<{ looked_at: number }>(BACKFILL.text, [2000]);
    expect(rows[0]?.looked_at).toBe(2000);
    await client.end();
    await check();
    await rollUps.backfill();
    await check();
    await end(late[1]);
    await rollUps.fold(); // both are added, and the backfill must pass them over
    await check();
    await rollUps.backfill();
    await end(late[2]);
    await rollUps.fold();
    await check();
    await backfillAll();
    await check();
    expect(await server.database.query('SELECT 1 FROM counter_delta')).toEqual([]);
    const total = await server.database.query<{ count: number }>(
      `SELECT sum(execution_count)::int AS count FROM execution_statistics WHERE granularity = 'minute' AND deployment_id = ANY ($1)`,
      [deployments.map(({ deployment_id }) => deployment_id)],
    );
    expect(total).toEqual([{ count: 2 * PER_DEPLOYMENT + 3 }]);
  });
});

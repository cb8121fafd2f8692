/*
 * node test/bench/statistics.mjs [--executions 1000000] [--days 60] [--deployments 8]
 *
 * How long the statistics and the lists take with a million executions. It starts a PostgreSQL and a server of the build in
 * `dist`, fills the table with executions of the last days as an earlier release left them, waits until the server has added
 * them in the background, and prints
 *   before   ms of the statement that earlier releases asked for statistics, which reads every execution
 *   after    ms of the route, median and slowest of some requests
 * A route for which PostgreSQL reads the whole table of executions (EXPLAIN) is marked.
 * Wanted are 200 ms at most for each route on a machine that has nothing else to do. It takes about five minutes.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { Client } from 'pg';
import { createDatabase, startPostgres } from './postgres.mjs';

const { values: options } = parseArgs({
  options: {
    executions: { type: 'string', default: '1000000' },
    days: { type: 'string', default: '60' },
    deployments: { type: 'string', default: '8' },
    dist: { type: 'string', default: new URL('../../dist', import.meta.url).pathname },
  },
});
const SAMPLES = 9;
const DAY_MS = 86_400_000;
const { createApp } = await import(join(options.dist, 'app.js'));
const { loadConfig } = await import(join(options.dist, 'config.js'));
const { SlowPool } = await import(join(options.dist, 'database/slow-pool.js'));
const { migrate } = await import(join(options.dist, 'database/data-source.js'));

/** As an earlier release had it. $1: deployment, $2 and $3: period, $4: begin of the series, $5: length of a step. */
const BEFORE = `
  SELECT grouping(bucket_start) = 1 AS is_total, bucket_start, count(*)::int AS execution_count,
         percentile_cont(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY duration_ms)
           FILTER (WHERE status <> 'cancelled') AS duration_ms,
         percentile_cont(ARRAY[0.5, 0.95, 0.99]) WITHIN GROUP (ORDER BY time_to_first_chunk_ms) AS time_to_first_chunk_ms,
         coalesce(sum(input_tokens), 0)::float8 AS input_tokens
    FROM (SELECT status, finished_at, input_tokens, output_tokens,
                 CASE WHEN finished_at >= $4 THEN date_trunc($5, finished_at, 'UTC') END AS bucket_start,
                 extract(epoch FROM finished_at - created_at)::float8 * 1000 AS duration_ms,
                 extract(epoch FROM first_chunk_at - created_at)::float8 * 1000 AS time_to_first_chunk_ms
            FROM execution
           WHERE deployment_id = $1 AND finished_at IS NOT NULL
             AND ($2::timestamptz IS NULL OR finished_at >= $2) AND ($3::timestamptz IS NULL OR finished_at < $3)) AS ended
   GROUP BY GROUPING SETS ((), (bucket_start))`;

/** Executions that ended evenly over the days; half of them of the first deployment. */
const FILL = `
  INSERT INTO execution (execution_id, deployment_id, deployment_name, environment, workflow_id, revision_id, status, input,
                         response, error, code, input_tokens, output_tokens, last_sequence, created_at, started_at,
                         first_chunk_at, finished_at)
  SELECT (lpad(to_hex((extract(epoch FROM created_at) * 1000)::bigint), 12, '0') || '7' || lpad(to_hex(n % 4096), 3, '0')
          || '8' || lpad(to_hex(n), 15, '0'))::uuid,
         deployment_id, deployment_name, environment, workflow_id, revision_id, made.status, '{"query": "How are you?"}',
         '"Very well, thank you."', CASE WHEN made.status = 'error' THEN 'It failed.' END,
         CASE WHEN made.status = 'error' THEN 'agent_error' END, 100, 50, 30, created_at, created_at,
         created_at + duration * 0.3 * interval '1 ms', created_at + duration * interval '1 ms'
    FROM (SELECT n, now() - (($2::bigint - n) * $3::float8 / $2) * interval '1 ms' - interval '1 minute' AS created_at,
                 exp(3 + 7 * random()) AS duration,
                 CASE WHEN random() < 0.9 THEN 'completed' WHEN random() < 0.6 THEN 'error' ELSE 'cancelled' END AS status,
                 CASE WHEN n % 2 = 0 THEN 1 ELSE 1 + (n / 2) % $4 END AS place
            FROM generate_series($1::bigint, $5::bigint) AS n) AS made
    JOIN (SELECT *, row_number() OVER (ORDER BY deployment_id) AS place FROM deployment) AS deployment USING (place)
   ORDER BY 1`;

const count = Number(options.executions);
const days = Number(options.days);
const folder = await mkdtemp(join(tmpdir(), 'agent-studio-bench-'));
const postgres = await startPostgres({ dist: options.dist, folder: join(folder, 'data') });
let app;
let client;
/** Statements of the routes, with their values. */
const asked = [];
try {
  const database = await createDatabase(postgres.url);
  await migrate(database.url);
  client = new Client({ connectionString: database.url });
  await client.connect();
  await fill();
  const env = { LOG_LEVEL: 'error', DATABASE_URL: database.url, DATABASE_SLOW_TIMEOUT_MS: '600000' };
  const config = loadConfig(env);
  app = await createApp({ ...config, DATABASE_URL: database.url });
  await app.listen(0, '127.0.0.1');
  const url = await app.getUrl();
  const pool = app.get(SlowPool);
  const ask = pool.ask.bind(pool);
  pool.ask = (statement) => {
    asked.push(statement);
    return ask(statement);
  };
  await waitForBackfill();
  const { rows } = await client.query('SELECT * FROM deployment ORDER BY deployment_id LIMIT 1');
  await measure(url, rows[0]);
} finally {
  await client?.end();
  await app?.close();
  await postgres.end();
  await rm(folder, { recursive: true, force: true });
}

async function fill() {
  await client.query(
    `INSERT INTO deployment (deployment_id, deployment_name, environment, workflow_id, revision_id, status, deployed_at)
     SELECT gen_random_uuid(), 'bench-' || n, 'production', gen_random_uuid(), gen_random_uuid(), 'active', now()
       FROM generate_series(1, $1::int) AS n`,
    [Number(options.deployments)],
  );
  const piece = 50_000;
  for (let from = 1; from <= count; from += piece) {
    const until = Math.min(from + piece - 1, count);
    await client.query(FILL, [from, count, days * DAY_MS, Number(options.deployments), until]);
  }
  await client.query(`INSERT INTO statistics_backfill VALUES ('ffffffff-ffff-ffff-ffff-ffffffffffff')`);
  await client.query('VACUUM ANALYZE');
  console.log(`${count} executions of ${options.deployments} deployments over ${days} days`);
}

async function waitForBackfill() {
  const start = performance.now();
  while ((await client.query('SELECT 1 FROM statistics_backfill')).rowCount > 0) await sleep(200);
  const seconds = (performance.now() - start) / 1000;
  const { rows } = await client.query(
    `SELECT count(*)::int AS rows, pg_size_pretty(pg_total_relation_size('execution_statistics')) AS size FROM execution_statistics`,
  );
  console.log(`added in ${seconds.toFixed(1)} s: ${rows[0].rows} sums, ${rows[0].size}`);
  await client.query('VACUUM ANALYZE execution_statistics');
}

async function measure(url, { deployment_id, deployment_name }) {
  const ago = (ms) => new Date(Date.now() - ms).toISOString();
  const statistics = [
    {},
    { bucket: 'minute' },
    { bucket: 'day' },
    { from: ago(30 * DAY_MS), bucket: 'day' },
    { from: ago(58 * DAY_MS), bucket: 'hour' },
    { from: ago(1.04 * DAY_MS), bucket: 'minute' },
    { from: ago(50 * DAY_MS), to: ago(49 * DAY_MS), bucket: 'minute' },
    { from: ago(20 * DAY_MS + 12_345), to: ago(10 * DAY_MS + 54_321), bucket: 'hour' },
  ];
  for (const query of statistics) {
    const { bucket = 'hour', from, to } = query;
    const step = { minute: 60_000, hour: 3_600_000, day: DAY_MS }[bucket];
    const seriesFrom = new Date(from ?? Date.now() - 60 * step);
    const before = await timed(() => client.query(BEFORE, [deployment_id, from, to, seriesFrom, bucket]));
    await report(
      `${url}/api/deployments/${deployment_name}/statistics?${new URLSearchParams(query)}`,
      before,
    );
  }
  const lists = [
    '',
    `deployment_name=${deployment_name}`,
    'deployment_name=bench-8&status=error',
    'deployment_name=unknown',
    'status=running',
    `from=${ago(31 * DAY_MS)}&to=${ago(30 * DAY_MS)}`,
    `deployment_name=bench-8&status=cancelled&from=${ago(59 * DAY_MS)}&to=${ago(58 * DAY_MS)}`,
  ];
  for (const query of lists) await report(`${url}/api/executions?${query}`);
  await report(`${url}/api/deployments`);
}

async function timed(work) {
  const start = performance.now();
  await work();
  return performance.now() - start;
}

/** Whether PostgreSQL reads the whole table of executions for any of the statements that were asked. */
async function scansAll() {
  for (const { text, values } of asked.splice(0)) {
    const { rows } = await client.query(`EXPLAIN ${text}`, values);
    if (rows.some((row) => /Seq Scan on execution\b(?!_)/.test(row['QUERY PLAN']))) return true;
  }
  return false;
}

async function report(address, before) {
  const times = [];
  asked.length = 0;
  for (let sample = 0; sample < SAMPLES; sample++) {
    times.push(
      await timed(async () => {
        const response = await fetch(address);
        await response.text();
        if (response.status !== 200) throw new Error(`${address} answers ${response.status}.`);
      }),
    );
  }
  times.sort((a, b) => a - b);
  const text = `${times[SAMPLES >> 1].toFixed(0)} / ${times.at(-1).toFixed(0)}`.padStart(11);
  const earlier = before === undefined ? '' : before.toFixed(0);
  const { pathname, search } = new URL(address);
  const mark = (await scansAll()) ? '  SEQUENTIAL SCAN' : '';
  console.log(`${earlier.padStart(8)} ${text} ms  ${pathname}${search}${mark}`);
}

#!/usr/bin/env node
/**
 * Runs several processes of the server as one system, until it is told to stop: PostgreSQL, api processes, workers, and
 * nginx in front. What docker-compose.yml does with its profile `scale`, for machines without Docker.
 */
import { existsSync } from 'node:fs';
import { join, relative } from 'node:path';
import { parseArgs } from 'node:util';
import { findNginx } from './stack/nginx.mjs';
import { Stack } from './stack/stack.mjs';
import { PortTakenError } from './stack/stack-process.mjs';

const HELP = `Usage: npm run stack -- [options]

Starts several processes of the server as one system on this machine: PostgreSQL, processes that answer requests
(ROLE=api), processes that run executions (ROLE=worker), and nginx in front of them. What dies is started again.
Ctrl-C stops everything.

  --api <number>      api processes, 2 by default
  --workers <number>  workers, 2 by default
  --redis             put the queue on a Redis of its own (needs redis-server)
  --help              this text

The configuration is that of "npm start": environment variables, and the file .env. PORT and HOST are nginx's. With
DATABASE_URL or REDIS_URL that PostgreSQL or Redis is used. Data and logs are in DATA_DIR/stack.`;

const HOW_TO_GET_NGINX =
  'nginx is not installed, so nothing spreads requests over the api processes: get it with ' +
  '"apt-get install nginx" or "brew install nginx", or send requests to any of the addresses below.';

const print = (text = '') => process.stdout.write(`${text}\n`);

function readOptions() {
  const { values } = parseArgs({
    options: {
      api: { type: 'string', default: '2' },
      workers: { type: 'string', default: '2' },
      redis: { type: 'boolean', default: false },
      help: { type: 'boolean', short: 'h' },
    },
  });
  return { ...values, api: readCount('api', values.api), workers: readCount('workers', values.workers) };
}

function readCount(name, text) {
  if (!/^[1-9]\d?$/.test(text)) throw new Error(`--${name} must be a number from 1 to 99, and is "${text}".`);
  return Number(text);
}

function createStack({ api, workers, redis }) {
  const { DATABASE_URL, REDIS_URL, DATA_DIR, HOST, PORT, SEED_EXAMPLE } = process.env;
  const nginx = findNginx() !== undefined;
  if (!nginx) print(HOW_TO_GET_NGINX);
  return new Stack({
    api,
    workers,
    nginx,
    redis,
    redisUrl: REDIS_URL,
    databaseUrl: DATABASE_URL,
    host: HOST || '127.0.0.1',
    port: Number(PORT || 8000),
    folder: join(DATA_DIR || './data', 'stack'),
    inheritEnv: true,
    // As a single server does it: a database of its own gets something to try.
    env: { SEED_EXAMPLE: SEED_EXAMPLE || (DATABASE_URL ? 'false' : 'true') },
    log: (message) => print(`${new Date().toISOString()}  ${message}`),
  });
}

function describe(stack) {
  const { apis, workers, nginx, postgres, redis, folder, url } = stack;
  const line = (name, address, pid) =>
    print(`  ${name.padEnd(10)} ${address.padEnd(28)} ${pid ? `pid ${pid}` : ''}`.trimEnd());
  print(`\nAgent Studio is at ${url}, its documentation at ${url}/api/docs\n`);
  for (const process of [nginx, ...apis, ...workers, redis]) {
    if (process) line(process.name, process.url, process.pid);
  }
  line('postgres', postgres ? `127.0.0.1:${postgres.port}` : new URL(stack.databaseUrl).host, postgres?.pid);
  print(`\nLogs are in ${relative('', join(folder, 'logs'))}. Ctrl-C stops everything.\n`);
}

async function run(options) {
  if (process.platform === 'win32') throw new Error('This needs Linux or macOS. Use Docker Compose here.');
  if (existsSync('.env')) process.loadEnvFile('.env');
  const stack = createStack(options);
  let isStopping = false;
  const stop = (reason) => {
    if (isStopping) return;
    isStopping = true;
    print(`${reason}: stopping everything. Running executions get SHUTDOWN_GRACE_MS to end.`);
    void stack.stop().then(() => print('Stopped.'));
  };
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, stop);
  // As in `npm run stack | head`: whoever reads has seen enough.
  process.stdout.on('error', () => stop('The output was closed'));
  try {
    await stack.start();
    describe(stack);
  } catch (error) {
    if (!isStopping) throw error;
  }
}

function explain(error) {
  const { PORT = '8000' } = process.env;
  const isOurs = error instanceof PortTakenError && String(error.port) === PORT;
  return `${error.message}${isOurs ? ' Stop that, or set PORT to another port.' : ''}`;
}

try {
  const options = readOptions();
  if (options.help) print(HELP);
  else await run(options);
} catch (error) {
  const isUsage = error.code?.startsWith('ERR_PARSE_ARGS') || error.message.startsWith('--');
  console.error(isUsage ? `${error.message}\n\n${HELP}` : `The stack did not start. ${explain(error)}`);
  process.exitCode = 1;
}

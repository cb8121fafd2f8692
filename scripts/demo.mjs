#!/usr/bin/env node
/**
 * Shows the server at work: starts one in a temporary folder, gives it a support desk of four agents, and prints what a
 * client sees. Leaves neither a process nor a file behind.
 */
import { spawn } from 'node:child_process';
import { createWriteStream, existsSync } from 'node:fs';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { createInterface } from 'node:readline';
import { parseArgs } from 'node:util';
import { Client, readEvents } from './sse-client.mjs';

const HELP = `Usage: npm run demo -- [options]

Starts a server of its own in a temporary folder, deploys a support desk of four agents, runs it, and shows what a
client sees: the stream, the steps, the statistics, an error, and how a stream is resumed. Nothing is left behind.

  --model <provider/model>  ask this model instead of the built-in one, which only repeats what it is given;
                            its provider is one of MODEL_PROVIDERS (see .env.example)
  --query <text>            what the customer writes
  --help                    this text`;

const OFFLINE_MODEL = 'offline/echo';
const NAME = 'support-desk';
const START_TIMEOUT_MS = 120_000;
/** Models take their time. */
const RUN_TIMEOUT_MS = 300_000;
/** More than what the server gives itself to finish. */
const STOP_TIMEOUT_MS = 20_000;
const SERVER = resolve(import.meta.dirname, '../dist/main.js');

const isColoured = process.stdout.isTTY === true && !process.env.NO_COLOR && process.env.TERM !== 'dumb';
const paint = (code) => (text) => (isColoured ? `\u001b[${code}m${text}\u001b[0m` : text);
const [bold, dim, green, red] = [paint(1), paint(2), paint(32), paint(31)];
const width = Math.min(process.stdout.columns || 100, 110);

const print = (text = '') => process.stdout.write(`${text}\n`);
const indent = (text) => text.replace(/^/gm, '   ');

let titles = 0;
function title(text, request = '') {
  print(`\n${bold(`${++titles}. ${text}`)}${request && `  ${dim(request)}`}`);
}

/** A question is sorted, one of two specialists answers it, and an editor makes the reply of it. */
function supportDesk(model) {
  const isBilling = 'query.lowerAscii().contains("invoice") || output.lowerAscii().startsWith("billing")';
  const agent = (agent_id, system_prompt) => ({
    agent_id,
    agent_type: 'llm',
    config: { model, system_prompt },
  });
  const either = (target_agent_id, expression) => ({
    source_agent_id: 'triage',
    target_agent_id,
    connection_type: 'conditional',
    conditions: { expression },
  });
  return {
    agents: [
      agent('triage', 'Say in one word what the request is about: billing or technical.'),
      agent(
        'billing',
        'You know prices, payments and refunds. Answer the request in at most five sentences.',
      ),
      agent(
        'technical',
        'You know the product from the inside. Answer the request in at most five sentences.',
      ),
      agent('editor', "Make a short and friendly reply out of the specialist's answer."),
    ],
    connections: [
      either('billing', isBilling),
      either('technical', `!(${isBilling})`),
      { source_agent_id: 'billing', target_agent_id: 'editor' },
      { source_agent_id: 'technical', target_agent_id: 'editor' },
    ],
  };
}

/** The server as a child process, with its data and its log in a folder of its own. */
class Server {
  /** @type {string} */
  folder;
  /** @type {import('node:child_process').ChildProcessByStdio<null, import('node:stream').Readable, import('node:stream').Readable>} */
  process;

  /** @returns {Promise<string>} its address */
  async start(signal) {
    if (!existsSync(SERVER)) throw new Error('The server is not built yet. Run: npm run build');
    this.folder = await mkdtemp(join(tmpdir(), 'agent-studio-demo-'));
    signal.throwIfAborted();
    const own = { HOST: '127.0.0.1', PORT: '0', DATA_DIR: this.folder, ROLE: 'all', SEED_EXAMPLE: 'false' };
    // Set to nothing, they count as not set, and what an .env file says about them does not matter either.
    const none = { DATABASE_URL: '', REDIS_URL: '' };
    this.process = spawn(process.execPath, [SERVER], {
      env: { ...process.env, ...own, ...none, LOG_LEVEL: 'info', SHUTDOWN_GRACE_MS: '2000' },
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    const log = createWriteStream(join(this.folder, 'server.log'));
    this.process.stderr.pipe(log, { end: false });
    this.process.stdout.pipe(log, { end: false });
    // What could not be spawned is noticed by its output, which ends.
    this.process.on('error', (error) => log.write(`${error.message}\n`));
    this.ended = new Promise((resolve) => this.process.once('close', resolve)).then(() => log.end());
    return this.address(signal);
  }

  /** Reads it from the line that the server prints once it listens. */
  address(signal) {
    return new Promise((resolve, reject) => {
      const lines = createInterface({ input: this.process.stdout });
      const late = new Error(`The server did not start within ${START_TIMEOUT_MS / 1000} s.`);
      const timeout = setTimeout(() => reject(late), START_TIMEOUT_MS);
      signal.addEventListener('abort', () => reject(signal.reason));
      lines.on('close', () => reject(new Error('The server did not start.')));
      lines.on('line', (line) => {
        const url = /^\{.*"url":"(http:[^"]+)"/.exec(line)?.[1];
        if (url) resolve(url);
      });
      lines.on('close', () => clearTimeout(timeout));
    });
  }

  /** What its log says at the end. */
  async lastWords() {
    const log = this.folder ? await readFile(join(this.folder, 'server.log'), 'utf8').catch(() => '') : '';
    return log.trimEnd().split('\n').slice(-15).join('\n');
  }

  async stop() {
    const { process: child } = this;
    if (child?.pid !== undefined && child.exitCode === null && child.signalCode === null) {
      child.kill('SIGTERM');
      const patience = setTimeout(() => child.kill('SIGKILL'), STOP_TIMEOUT_MS);
      await this.ended;
      clearTimeout(patience);
    }
    if (this.folder) await rm(this.folder, { recursive: true, force: true, maxRetries: 5 });
  }
}

/** Prints text as it comes, with the number and the time of the first chunk of each line before it. */
class Flow {
  line = '';

  /** @param {{sequence: number, ms: number}} chunk */
  write({ sequence, ms }, text) {
    for (const [word] of text.matchAll(/\n|[^\s]+[^\S\n]*|[^\S\n]+/g)) {
      if (word === '\n') {
        if (this.line === '') this.begin(sequence, ms);
        this.end();
        continue;
      }
      if (this.line.length + word.trimEnd().length > width) this.end();
      if (this.line === '') this.begin(sequence, ms);
      this.line += word;
      process.stdout.write(word);
    }
  }

  begin(sequence, ms) {
    this.line = `   ${`#${sequence}`.padStart(5)} ${String(Math.round(ms)).padStart(6)} ms  `;
    process.stdout.write(dim(this.line));
  }

  end() {
    if (this.line !== '') print();
    this.line = '';
  }

  status(chunk, text) {
    this.end();
    this.write(chunk, text);
    this.end();
  }
}

async function main({ model, query }, signal, server) {
  print(bold('Agent Studio') + dim('  a demo on a server of its own'));

  title('Start a server', 'PostgreSQL included');
  const startedAt = performance.now();
  const client = new Client(await server.start(signal), signal, RUN_TIMEOUT_MS);
  print(indent(`${client.url}, ready after ${seconds(startedAt)}`));

  const workflow = await createWorkflow(client, model);
  await deploy(client, workflow);
  await runAndWait(client, query);
  const { execution_id, chunks } = await runAndStream(client, query);
  await showSteps(client, execution_id);
  await resume(client, execution_id, chunks);
  await showStatistics(client);
  await showError(client, query);

  title('Stop the server');
  const stoppingAt = performance.now();
  await server.stop();
  print(indent(`stopped after ${seconds(stoppingAt)}, and its folder is removed`));
  print(
    `\n${green('Done.')} Now yours: ${bold('npm start')}, then http://127.0.0.1:8000/api/docs and the clients in examples/.`,
  );
}

const seconds = (since) => `${((performance.now() - since) / 1000).toFixed(1)} s`;

/** The server said no, so its log would say nothing more. */
class RefusedError extends Error {}

/** The answer's body; throws what the server said if it refused. */
async function send(client, method, path, body) {
  const answer = await client.send(method, path, { body });
  if (answer.status >= 300) throw refusal(answer);
  return answer.body;
}

function refusal({ status, body }) {
  const text = `The server answered with ${status}. ${body.detail ?? body}`;
  return status < 500 ? new RefusedError(text) : new Error(text);
}

async function createWorkflow(client, model) {
  title('Create a workflow', 'POST /api/workflows');
  const workflow = await send(client, 'POST', '/api/workflows', {
    name: NAME,
    configuration: supportDesk(model),
  });
  const graph = ['         ┌─ billing ───┐', 'triage ──┤             ├── editor', '         └─ technical ─┘'];
  print(indent(graph.join('\n')));
  const kind = model === OFFLINE_MODEL ? `${model}, which only repeats what it is given` : model;
  print(indent(`workflow ${workflow.workflow_id}, version ${workflow.version}; its agents ask ${kind}`));
  return workflow;
}

async function deploy(client, { workflow_id }) {
  title('Deploy it', `POST /api/workflows/${workflow_id}/deploy`);
  const body = { deployment_name: NAME, deployed_by: 'demo' };
  const { deployment_name, environment, status } = await send(
    client,
    'POST',
    `/api/workflows/${workflow_id}/deploy`,
    body,
  );
  print(indent(`"${deployment_name}" in the environment "${environment}" is ${status}`));
}

async function runAndWait(client, query) {
  title('Run it and wait', 'POST /api/workflows/execute');
  print(indent(`query: ${query}`));
  const { status, response, duration_ms, usage } = await send(client, 'POST', '/api/workflows/execute', {
    deployment_name: NAME,
    query,
  });
  print(indent(`${status} after ${duration_ms} ms, ${tokens(usage)}; the response begins:`));
  const begin = response.slice(0, width - 10);
  print(indent(`   ${begin.replaceAll('\n', ' ')}${begin === response ? '' : '…'}`));
}

const tokens = (usage) => `${usage.input_tokens} tokens in, ${usage.output_tokens} out`;

async function runAndStream(client, query) {
  title('Run it and stream', 'POST /api/workflows/execute/stream');
  const begunAt = performance.now();
  const body = { deployment_name: NAME, query };
  const response = await client.open('POST', '/api/workflows/execute/stream', { body });
  if (!response.ok) throw refusal({ status: response.status, body: await response.json() });
  const flow = new Flow();
  const chunks = [];
  for await (const { data } of readEvents(response.body)) {
    const chunk = { ...JSON.parse(data), ms: performance.now() - begunAt };
    chunks.push(chunk);
    if (chunk.type === 'content') flow.write(chunk, chunk.data);
    else flow.status(chunk, chunk.status === 'error' ? red(`error: ${chunk.error}`) : green(chunk.status));
  }
  const last = chunks.at(-1);
  if (last?.status !== 'completed')
    throw new Error(`The execution ended as "${last?.status}": ${last?.error ?? ''}`);
  print(indent(dim('(number of the chunk, ms since the request was sent, text)')));
  return { execution_id: last.execution_id, chunks };
}

async function showSteps(client, executionId) {
  const path = `/api/executions/${executionId}/steps`;
  title('See what each agent did', `GET ${path}`);
  const { items } = await send(client, 'GET', path);
  for (const { agent_id, status, duration_ms, usage } of items) {
    const did = status === 'skipped' ? '' : `${String(duration_ms).padStart(6)} ms   ${tokens(usage)}`;
    print(indent(`${agent_id.padEnd(10)} ${status.padEnd(10)} ${did}`.trimEnd()));
  }
}

async function resume(client, executionId, chunks) {
  const path = `/api/executions/${executionId}/stream`;
  title('Resume the stream, as after a broken connection', `GET ${path}`);
  const { sequence } = chunks[Math.floor(chunks.length / 2)];
  const headers = { 'last-event-id': `${executionId}:${sequence}` };
  print(indent(`Last-Event-ID: ${headers['last-event-id']}`));
  const response = await client.open('GET', path, { headers });
  if (!response.ok) throw refusal({ status: response.status, body: await response.json() });
  const resumed = [];
  for await (const { data } of readEvents(response.body)) resumed.push(JSON.parse(data).sequence);
  const missing = chunks.map((chunk) => chunk.sequence).filter((number) => number > sequence);
  if (resumed.join() !== missing.join()) throw new Error(`The stream went on with ${resumed.join()}.`);
  print(
    indent(
      `goes on with #${resumed[0]} and ends with #${resumed.at(-1)}: ${resumed.length} chunks, none lost, none twice`,
    ),
  );
}

async function showStatistics(client) {
  const path = `/api/deployments/${NAME}/statistics`;
  title('See how the deployment does', `GET ${path}`);
  const statistics = await send(client, 'GET', path);
  const { execution_count, success_count, error_rate, duration_ms, time_to_first_chunk_ms, usage } =
    statistics;
  print(
    indent(
      `executions        ${execution_count}, of which ${success_count} succeeded; error rate ${error_rate * 100} %`,
    ),
  );
  print(
    indent(
      `duration          ${duration_ms.p50} ms in the median, ${duration_ms.p95} ms for the 95th percentile`,
    ),
  );
  print(indent(`until first text  ${time_to_first_chunk_ms.p50} ms in the median`));
  print(indent(`usage             ${tokens(usage)}`));
}

async function showError(client, query) {
  title('Ask for what is not there', 'POST /api/workflows/execute/stream');
  const body = { deployment_name: 'no-such-desk', query };
  const { status, body: problem } = await client.send('POST', '/api/workflows/execute/stream', { body });
  if (status !== 404) throw new Error(`An unknown deployment was answered with ${status}.`);
  print(indent(`${red(String(status))} ${problem.code}: ${problem.detail}`));
}

function readOptions() {
  const text = { type: 'string' };
  const { values } = parseArgs({
    options: { model: text, query: text, help: { type: 'boolean', short: 'h' } },
  });
  const { model = OFFLINE_MODEL, query = 'My last invoice is wrong. What can I do?', help } = values;
  return { model, query, help };
}

async function run(options) {
  const interrupted = new AbortController();
  const interrupt = (reason) => interrupted.abort(new Error(reason));
  for (const name of ['SIGINT', 'SIGTERM', 'SIGHUP'])
    process.on(name, () => interrupt(`Stopped by ${name}.`));
  // As in `npm run demo | head`: whoever reads has seen enough.
  process.stdout.on('error', () => interrupt('The output was closed.'));
  const server = new Server();
  try {
    await main(options, interrupted.signal, server);
  } catch (error) {
    process.exitCode = 1;
    console.error(`\n${red('The demo failed:')} ${error.message}`);
    if (!interrupted.signal.aborted && !(error instanceof RefusedError)) {
      const log = await server.lastWords();
      if (log) console.error(dim(`\nThe end of the server's log:\n${indent(log)}`));
    }
  } finally {
    await server.stop();
  }
}

try {
  const options = readOptions();
  if (options.help) print(HELP);
  else await run(options);
} catch (error) {
  console.error(`${error.message}\n\n${HELP}`);
  process.exitCode = 1;
}

// The three servers that are compared, and what they need.
import { createServer } from 'node:http';
import { once } from 'node:events';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { Child } from './processes.mjs';
import { AGENT, DEPLOYMENT, modelName } from './streams.mjs';
import { deploy } from './studio.mjs';

const READY_TIMEOUT_MS = 30_000;
/** Longer than any model of the benchmark is silent. */
const MODEL_TIMEOUT_MS = 600_000;

const script = (name) => fileURLToPath(new URL(`./servers/${name}.mjs`, import.meta.url));

/** By the letter that `--only` takes. */
export const SERVERS = {
  a: { title: 'Agent Studio', start: startWithDeployment },
  b: { title: 'bare SSE', start: (options) => startBare('bare-sse', options) },
  c: { title: 'bare streamText', start: (options) => startBare('stream-text', options) },
};

export const REQUEST_PATH = '/api/workflows/execute/stream';

export async function startUpstream(options) {
  const child = new Child('upstream', { ...options, args: [script('upstream')] });
  return { child, url: `http://127.0.0.1:${await child.ready}/v1` };
}

export async function startLoad(options) {
  const file = fileURLToPath(new URL('./load.mjs', import.meta.url));
  const child = new Child('load', { ...options, args: [file] });
  await child.ready;
  return { child };
}

async function startBare(name, { upstreamUrl, ...options }) {
  const child = new Child(name, { ...options, args: [script(name)], env: { UPSTREAM_URL: upstreamUrl } });
  return { child, port: await child.ready };
}

/** Starts Agent Studio in one process, where the model of the benchmark is deployed. */
async function startWithDeployment(options) {
  const server = await startAgentStudio(options);
  await deployModel(server.url);
  return server;
}

/** Deploys the workflow that all suites stream: one agent, whose model each request names. */
export async function deployModel(url) {
  const agent = { agent_id: AGENT, agent_type: 'llm', config: { model: `bench/${modelName()}` } };
  await deploy(url, DEPLOYMENT, agent);
}

/**
 * Starts one process of Agent Studio.
 * @param options.env variables of its configuration
 */
export async function startAgentStudio({ upstreamUrl, databaseUrl, dist, role = 'all', env, ...options }) {
  const port = await freePort();
  const child = new Child(role === 'all' ? 'agent-studio' : role, {
    ...options,
    args: [join(dist, 'main.js')],
    env: {
      ...env,
      ROLE: role,
      PORT: String(port),
      DATABASE_URL: databaseUrl,
      LOG_LEVEL: 'error',
      MODEL_PROVIDERS: JSON.stringify({
        bench: { type: 'openai-compatible', base_url: upstreamUrl, timeout_ms: MODEL_TIMEOUT_MS },
      }),
    },
  });
  const url = `http://127.0.0.1:${port}`;
  await untilReady(url, child);
  return { child, port, url };
}

/** At this log level the server doesn't print which port it took, so it is given one. */
async function freePort() {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address();
  server.close();
  await once(server, 'close');
  return port;
}

async function untilReady(url, child) {
  const giveUp = performance.now() + READY_TIMEOUT_MS;
  while (performance.now() < giveUp && !child.hasEnded) {
    const answer = await fetch(`${url}/health/ready`).catch(() => undefined); // it doesn't listen yet
    if (answer?.ok) return;
    await sleep(50);
  }
  throw new Error(`Agent Studio was not ready within ${READY_TIMEOUT_MS / 1000} s.`);
}

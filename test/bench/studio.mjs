// What the suites ask of Agent Studio besides streams.
import { setTimeout as sleep } from 'node:timers/promises';
import { DEPLOYMENT, modelName } from './streams.mjs';

const REQUEST_TIMEOUT_MS = 30_000;
const POLL_MS = 50;
const ENDED_POLL_MS = 20;

/** The request that every server gets; what the model answers is in its name (see streams.mjs). */
export function requestOf(answer) {
  return {
    deployment_name: DEPLOYMENT,
    query: 'Count.',
    runtime_overrides: { model: `bench/${modelName(answer)}` },
  };
}

/** Deploys a workflow of one agent. */
export async function deploy(url, deployment_name, agent) {
  const workflow = { name: deployment_name, configuration: { agents: [agent] } };
  const { workflow_id } = await post(`${url}/api/workflows`, workflow);
  await post(`${url}/api/workflows/${workflow_id}/deploy`, { deployment_name });
}

/** Begins an execution whose model answers so; resolves with its id. */
export async function begin(url, answer) {
  const { execution_id } = await post(`${url}/api/workflows/execute/async`, requestOf(answer));
  return execution_id;
}

/** Waits until an execution has completed; rejects if it ended otherwise, as it does at the server's time limit. */
export async function untilCompleted(url, executionId) {
  for (;;) {
    const answer = await get(`${url}/api/executions/${executionId}/progress`);
    const { status } = await answer.json();
    if (status === 'completed') return;
    if (status !== 'queued' && status !== 'running') throw new Error(`The execution ended as "${status}".`);
    await sleep(POLL_MS);
  }
}

/** Ends an execution. */
export async function cancel(url, executionId) {
  await post(`${url}/api/executions/${executionId}/cancel`, {});
}

/** A metric without labels of `GET /metrics`; null if there is none of this name. */
export async function readMetric(url, name) {
  const answer = await get(`${url}/metrics`);
  const value = new RegExp(`^${name} (\\S+)$`, 'm').exec(await answer.text())?.[1];
  return value === undefined ? null : Number(value);
}

/** Waits until a metric has a value; resolves with the ms that it took, or null if it did not within `limitMs`. */
export async function untilMetric(url, name, { value, limitMs }) {
  const begun = performance.now();
  while (performance.now() - begun < limitMs) {
    if ((await readMetric(url, name)) === value) return performance.now() - begun;
    await sleep(POLL_MS);
  }
  return null;
}

/** Waits until so many executions of a deployment have ended; resolves with how many of them did not complete. */
export async function untilEnded(url, deploymentName, { count, limitMs }) {
  const giveUp = performance.now() + limitMs;
  for (;;) {
    const answer = await get(`${url}/api/deployments/${deploymentName}`);
    const { execution_count: ended, success_count: completed } = await answer.json();
    if (ended >= count) return ended - completed;
    if (performance.now() > giveUp) throw new Error(`Only ${ended} of ${count} executions have ended.`);
    await sleep(ENDED_POLL_MS);
  }
}

async function get(url) {
  const answer = await fetch(url, { signal: AbortSignal.timeout(REQUEST_TIMEOUT_MS) });
  if (!answer.ok) throw new Error(`GET ${url} was answered with ${answer.status}: ${await answer.text()}`);
  return answer;
}

export async function post(url, body) {
  const answer = await fetch(url, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify(body),
    signal: AbortSignal.timeout(REQUEST_TIMEOUT_MS),
  });
  const text = await answer.text();
  if (!answer.ok) throw new Error(`POST ${url} was answered with ${answer.status}: ${text}`);
  return JSON.parse(text);
}

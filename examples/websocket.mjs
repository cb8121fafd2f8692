#!/usr/bin/env node
// Runs a deployment for each query, all at once over one WebSocket, and prints each answer when it is whole. Where the
// connection breaks, each one goes on at its next chunk.
//   node examples/websocket.mjs [query …]        needs Node.js 22 or later, or the package ws
import { argv, env, stderr, stdout } from 'node:process';
import { setTimeout as sleep } from 'node:timers/promises';

// What browsers have, too.
const WebSocket = globalThis.WebSocket ?? (await import('ws')).WebSocket;

const MOST_FAILURES = 10; // connections in a row that brought nothing new
const RETRY_MS = 1000;

const { DEPLOYMENT: deployment = 'support-desk', SERVER: server = 'http://127.0.0.1:8000' } = env;
const queries =
  argv.length > 2 ? argv.slice(2) : ['My last invoice is wrong.', 'How do I reset it?', 'Thank you!'];

/** What is known of each run. `key` makes `execute` safe to repeat until the answer is there, `after` says where to go on. */
const runs = queries.map((query, index) => ({
  id: index + 1,
  query,
  key: crypto.randomUUID(),
  after: 0,
  said: [],
}));
const isOver = ({ status }) => status !== undefined;

/** What is to be sent for a run on a new connection. */
function request({ id, query, key, executionId, after }) {
  return executionId
    ? { event: 'subscribe', id, data: { execution_id: executionId, after } }
    : { event: 'execute', id, data: { deployment_name: deployment, query, idempotency_key: key } };
}

/** Takes over what a message says of a run. */
function take(run, { event, after, data }) {
  if (event === 'accepted') run.executionId = data.execution_id;
  if (event === 'error' && data.status < 500) finish(run, 'refused', data.detail);
  if (event !== 'chunk') return;
  run.after = after; // where to go on behind this chunk
  if (data.type === 'content') run.said.push(data);
  else if (data.status === 'restarted') {
    // A server died, and this agent's part begins anew: what it said after `discard_after` is void.
    run.said = run.said.filter((c) => c.agent_id !== data.agent_id || c.sequence <= data.discard_after);
  } else if (['completed', 'error', 'cancelled'].includes(data.status)) finish(run, data.status, data.error);
}

function finish(run, status, error) {
  run.status = status;
  stdout.write(`--- query-${run.id}: ${status}\n${run.said.map(({ data }) => data).join('')}\n`);
  if (error) stderr.write(`[query-${run.id}: ${error}]\n`);
}

/** One connection: asks for all that is not over, and resolves when everything is, or when the connection has ended. */
function connect() {
  const socket = new WebSocket(`${server.replace(/^http/, 'ws')}/api/ws`);
  let brought = false;
  return new Promise((resolve) => {
    socket.onopen = () =>
      runs.filter((run) => !isOver(run)).forEach((run) => socket.send(JSON.stringify(request(run))));
    socket.onmessage = ({ data }) => {
      const message = JSON.parse(data);
      const run = runs.find(({ id }) => id === message.id);
      if (!run || isOver(run)) return;
      brought ||= message.event === 'chunk';
      take(run, message);
      if (runs.every(isOver) || (message.event === 'error' && !isOver(run))) socket.close(); // the latter: try again later
    };
    socket.onerror = () => {}; // `onclose` follows
    socket.onclose = () => resolve(brought);
  });
}

for (let failures = 0; failures < MOST_FAILURES; failures++) {
  if (await connect()) failures = 0;
  if (runs.every(isOver)) break;
  stderr.write('[no connection]\n');
  await sleep(RETRY_MS * 2 ** Math.min(failures, 4));
}
process.exitCode = runs.every(({ status }) => status === 'completed') ? 0 : 1;
if (!runs.every(isOver)) stderr.write('The server can not be reached.\n');

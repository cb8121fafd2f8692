#!/usr/bin/env node
// Runs a deployment and prints its answer while it is generated. Where the connection breaks, it goes on at the next chunk.
//   node examples/node.mjs [query] [deployment] [server]        needs Node.js 20 or later, nothing else
import { argv, env, stderr, stdout } from 'node:process';
import { setTimeout as sleep } from 'node:timers/promises';

const MOST_FAILURES = 10; // connections in a row that brought nothing new

const [
  query = env.QUERY ?? 'My last invoice is wrong. What can I do?',
  deployment = env.DEPLOYMENT ?? 'support-desk',
  server = env.SERVER ?? 'http://127.0.0.1:8000',
] = argv.slice(2);

/** Yields the events of one connection. Its bytes may be split anywhere, inside a line or a character too. */
async function* readEvents(body) {
  let rest = '';
  let event = {};
  for await (const text of body.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + text).split(/\r\n|\n|\r(?!$)/); // a CR at the end may be the first half of CR LF
    rest = lines.pop();
    for (const line of lines) {
      if (line === '') {
        if (event.data !== undefined) yield event;
        event = {}; // an event that no empty line ends does not count
      } else {
        const [, name, value] = /^([^:]*):? ?(.*)$/s.exec(line);
        event[name] = name === 'data' && event.data !== undefined ? `${event.data}\n${value}` : value;
      }
    }
  }
}

/** Runs the request once and yields its chunks, each once and in order, over as many connections as it takes. */
async function* execute(request) {
  // What makes the request safe to repeat: the key until the first event is there, then the id of the last one.
  const headers = { 'Content-Type': 'application/json', 'Idempotency-Key': crypto.randomUUID() };
  const body = JSON.stringify(request);
  let retry = 1000;
  for (let failures = 0; failures < MOST_FAILURES; failures++) {
    try {
      const response = await fetch(`${server}/api/workflows/execute/stream`, {
        method: 'POST',
        headers,
        body,
      });
      if (response.status === 204) return; // nothing comes after the last event
      if (response.status >= 400 && response.status < 500) throw new Error((await response.json()).detail);
      for await (const event of readEvents(response.body)) {
        headers['Last-Event-ID'] = event.id;
        retry = Number(event.retry ?? retry);
        failures = 0;
        const chunk = JSON.parse(event.data);
        yield chunk;
        if (['completed', 'error', 'cancelled'].includes(chunk.status)) return;
      }
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // a TypeError is how fetch says that the network failed
    }
    stderr.write('\n[no connection]\n');
    await sleep(retry);
  }
  throw new Error('The server can not be reached.');
}

/** Prints what the agents say; resolves to the status of the end. */
async function print(chunks) {
  let said = [];
  for await (const chunk of chunks) {
    if (chunk.type === 'content') {
      said.push(chunk);
      stdout.write(chunk.data);
    } else if (chunk.status === 'restarted') {
      // A server died, and this agent's part begins anew: what it said after `discard_after` is void.
      said = said.filter((c) => c.agent_id !== chunk.agent_id || c.sequence <= chunk.discard_after);
      stdout.write(`\n[started again]\n${said.map(({ data }) => data).join('')}`);
    } else if (chunk.status !== 'started') {
      stdout.write('\n');
      stderr.write(chunk.status === 'error' ? `[error: ${chunk.error}]\n` : `[${chunk.status}]\n`);
      return chunk.status;
    }
  }
}

try {
  const status = await print(execute({ deployment_name: deployment, query }));
  process.exitCode = status === 'completed' ? 0 : 1;
} catch (error) {
  stderr.write(`${error.message}\n`);
  process.exitCode = 1;
}

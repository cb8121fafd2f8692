#!/usr/bin/env node
// Runs a deployment for many queries at once and prints each answer when it is whole. Where the connection breaks, it goes on
// at the next chunk.
//   node examples/batch.mjs [query …]        needs Node.js 20 or later, nothing else
import { argv, env, stderr, stdout } from 'node:process';
import { setTimeout as sleep } from 'node:timers/promises';

const MOST_FAILURES = 10; // connections in a row that brought nothing new

const { DEPLOYMENT: deployment = 'support-desk', SERVER: server = 'http://127.0.0.1:8000' } = env;
const queries =
  argv.length > 2 ? argv.slice(2) : ['My last invoice is wrong.', 'How do I reset it?', 'Thank you!'];

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

/** Whether nothing more comes: of its item, or of the whole batch, if the chunk is of no item. */
const isLast = ({ status }) => ['completed', 'error', 'cancelled'].includes(status);

/** Runs the batch once and yields the chunks of all its items, each once, over as many connections as it takes. */
async function* execute(batch) {
  // What makes the request safe to repeat: the key until the first event is there, then the id of the last one.
  const headers = { 'Content-Type': 'application/json', 'Idempotency-Key': crypto.randomUUID() };
  const body = JSON.stringify(batch);
  let retry = 1000;
  for (let failures = 0; failures < MOST_FAILURES; failures++) {
    try {
      const response = await fetch(`${server}/api/workflows/execute/batch/stream`, {
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
        if (chunk.item_id === undefined && isLast(chunk)) return;
      }
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // a TypeError is how fetch says that the network failed
    }
    stderr.write('[no connection]\n');
    await sleep(retry);
  }
  throw new Error('The server can not be reached.');
}

/** Prints what each item said as soon as it has ended; resolves to how many items there are in each state. */
async function print(chunks) {
  const said = new Map();
  for await (const chunk of chunks) {
    const { type, item_id, agent_id, data } = chunk;
    const own = said.get(item_id) ?? [];
    if (type === 'content') {
      own.push(chunk);
      said.set(item_id, own);
    } else if (chunk.status === 'restarted') {
      // A server died, and this agent's part of the item begins anew: what it said after `discard_after` is void.
      const isValid = (c) => c.agent_id !== agent_id || c.sequence <= chunk.discard_after;
      said.set(item_id, own.filter(isValid));
    } else if (isLast(chunk)) {
      if (item_id === undefined) return data.counts;
      said.delete(item_id);
      stdout.write(`--- ${item_id}: ${chunk.status}\n${own.map((c) => c.data).join('')}\n`);
      if (chunk.status === 'error') stderr.write(`[${item_id}: ${chunk.error}]\n`);
    }
  }
}

try {
  const items = queries.map((query, index) => ({ item_id: `query-${index + 1}`, query }));
  const counts = await print(execute({ deployment_name: deployment, items }));
  stderr.write(`[${JSON.stringify(counts)}]\n`);
  process.exitCode = counts && counts.completed === counts.total ? 0 : 1;
} catch (error) {
  stderr.write(`${error.message}\n`);
  process.exitCode = 1;
}

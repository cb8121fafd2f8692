/** Checks the WebSocket: the same chunks as the event streams, resumed anywhere, many at once, and the same errors. */
import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { WebSocket } from 'ws';
import { readEventsOf, UUID } from './stream-rules.mjs';
import { QUERY } from './verification.mjs';

/** @typedef {import('./verification.mjs').Verification} Verification */
/** @typedef {{event: string, id: number, after: number, data: any, text: string}} Answer `text` is that of `data` */

const AT_ONCE = 10;
const NOBODY = '01900000-0000-7000-8000-00000000ffff';

/** One connection, which collects what comes. */
class Socket {
  /** @type {Answer[]} */
  answers = [];
  #ids = 0;
  #wake = () => {};

  /** @param {Verification} verification */
  constructor({ client }) {
    this.webSocket = new WebSocket(`${client.url.replace(/^http/, 'ws')}/api/ws`, { signal: client.limit() });
    this.webSocket.on('message', (bytes) => {
      const raw = String(bytes);
      this.answers.push({ ...JSON.parse(raw), text: raw.slice(raw.indexOf('"data":') + 7, -1) });
      this.#wake();
    });
    const fail = (reason) => {
      this.failure ??= new Error(reason);
      this.#wake();
    };
    this.webSocket.on('close', (code) => fail(`the server closed the WebSocket with ${code}`));
    this.webSocket.on('error', (error) => fail(`the WebSocket failed: ${error.message}`));
    this.limit = setTimeout(() => fail('the answer does not come'), client.timeoutMs);
  }

  async open() {
    if (this.webSocket.readyState === WebSocket.CONNECTING) {
      await Promise.race([once(this.webSocket, 'open'), this.news(() => this.failure !== undefined)]);
    }
    if (this.failure) throw this.failure;
    return this;
  }

  send(event, data) {
    const id = ++this.#ids;
    this.webSocket.send(JSON.stringify({ event, id, data }));
    return id;
  }

  /** Resolves once `isThere` gives something. */
  async news(isThere) {
    for (;;) {
      const found = isThere();
      if (found) return found;
      if (this.failure) throw this.failure;
      await new Promise((resolve) => (this.#wake = resolve));
    }
  }

  /** @returns {Promise<Answer>} the first answer to a message */
  ask(event, data) {
    const id = this.send(event, data);
    return this.news(() => this.answers.find((answer) => answer.id === id));
  }

  /** @returns {Promise<Answer[]>} the chunks of a stream, up to its end */
  async chunks(id) {
    const last = await this.news(() =>
      this.answers.find((answer) => answer.id === id && ['end', 'error'].includes(answer.event)),
    );
    assert.equal(last.event, 'end', `the stream ended with ${last.text}`);
    return this.answers.filter((answer) => answer.id === id && answer.event === 'chunk');
  }

  close() {
    clearTimeout(this.limit);
    this.webSocket.close();
  }
}

/** @param {Verification} verification */
export async function checkWebSocket(verification) {
  const { check, get, name } = verification;
  const socket = new Socket(verification);
  const isOpen = await check('a WebSocket is opened, and answers a ping under its id', async () => {
    await socket.open();
    assert.equal((await socket.ask('ping')).event, 'pong');
  });
  if (isOpen) {
    await check('the WebSocket is described in AsyncAPI 3', async () => {
      const { asyncapi, channels } = await get('/api/asyncapi.json');
      assert.match(asyncapi, /^3\./);
      assert.ok(channels.studio.messages.execute, 'the message that executes is not described');
    });
    await checkStreams(verification, socket);
    await checkErrors(verification, socket);
    await check(
      'a cancellation over the WebSocket ends the stream, and nothing follows its end',
      async () => {
        const id = socket.send('execute', { deployment_name: name, query: 'word '.repeat(2000) });
        const { data } = await socket.news(() => socket.answers.find((answer) => answer.id === id));
        const answer = await socket.ask('cancel', { execution_id: data.execution_id });
        const chunks = await socket.chunks(id);
        const { status } = JSON.parse(chunks.at(-1)?.text ?? '{}');
        // It may have been faster.
        if (answer.event === 'cancelled') assert.equal(status, 'cancelled');
        else assert.equal(answer.data.code, 'execution_finished');
      },
    );
  }
  socket.close();
  const accepted = socket.answers.filter(({ event }) => event === 'accepted');
  // Ids ascend with time.
  verification.executionIds.push(
    ...new Set(accepted.map(({ data }) => data.execution_id).toSorted(ascending)),
  );
}

/** @param {Verification} verification @param {Socket} socket */
async function checkStreams({ check, stream, name, started }, socket) {
  const key = randomUUID();
  const request = { deployment_name: name, query: QUERY, idempotency_key: key };
  const run = await check(
    'a run over a WebSocket has the chunks of its event stream, byte for byte',
    async () => {
      const id = socket.send('execute', request);
      const chunks = await socket.chunks(id);
      const { data } = socket.answers.find((answer) => answer.id === id) ?? {};
      assert.match(data.execution_id, UUID);
      const path = `/api/executions/${data.execution_id}/stream`;
      const events = readEventsOf(await stream('GET', path));
      assert.deepEqual(
        chunks.map(({ after, text }) => [`${data.execution_id}:${after}`, text]),
        events.map((event) => [event.id, event.data]),
      );
      return { execution_id: data.execution_id, chunks };
    },
  );
  if (!run) return;
  await check('a WebSocket goes on right behind any chunk, and says where nothing is left', async () => {
    const { execution_id, chunks } = run;
    for (const after of [0, 1, Math.floor(chunks.length / 2), chunks.length - 1, chunks.length]) {
      const { id, event } = await socket.ask('subscribe', { execution_id, after });
      assert.equal(event, 'subscribed');
      const rest = (await socket.chunks(id)).map(({ text }) => text);
      assert.deepEqual(
        rest,
        chunks.slice(after).map(({ text }) => text),
      );
    }
  });
  await check('the same key over a WebSocket gets the same execution, and runs nothing', () =>
    started(0, async () => {
      const { id, data } = await socket.ask('execute', request);
      assert.equal(data.execution_id, run.execution_id);
      const again = await socket.chunks(id);
      assert.deepEqual(
        again.map(({ text }) => text),
        run.chunks.map(({ text }) => text),
      );
    }),
  );
  await check(
    `${AT_ONCE} runs at once on one WebSocket get their own chunks only, each all of them`,
    async () => {
      const markers = Array.from({ length: AT_ONCE }, () => randomUUID());
      const ids = markers.map((query) => socket.send('execute', { deployment_name: name, query }));
      for (const [index, id] of ids.entries()) {
        const chunks = (await socket.chunks(id)).map(({ text }) => JSON.parse(text));
        chunks.forEach(({ sequence }, at) => assert.equal(sequence, at + 1));
        const said = chunks.map(({ type, data }) => (type === 'content' ? data : '')).join('');
        const named = markers.filter((marker) => said.includes(marker));
        assert.deepEqual(named, [markers[index]]);
      }
    },
  );
}

/** @param {Verification} verification @param {Socket} socket */
async function checkErrors({ check, name }, socket) {
  await check('what a WebSocket refuses has the code and the status that it has over HTTP', async () => {
    const cases = [
      ['dance', undefined, 'validation_failed', 400],
      ['execute', { deployment_name: name, query: 1 }, 'validation_failed', 400],
      ['execute', { deployment_name: `${name}-not`, query: 'x' }, 'deployment_not_found', 404],
      ['subscribe', { execution_id: NOBODY }, 'execution_not_found', 404],
      ['cancel', { batch_id: NOBODY }, 'batch_not_found', 404],
    ];
    for (const [event, data, code, status] of cases) {
      const answer = await socket.ask(event, data);
      assert.equal(answer.event, 'error', `${event} is answered with ${answer.event}`);
      assert.deepEqual([answer.data.code, answer.data.status], [code, status]);
    }
  });
}

function ascending(one, other) {
  return one < other ? -1 : 1;
}

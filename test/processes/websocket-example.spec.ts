import { once } from 'node:events';
import { connect, createServer } from 'node:net';
import type { AddressInfo, Socket } from 'node:net';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { WebSocketServer } from 'ws';
import { startTestApp } from '../support/app.js';
import type { TestApp } from '../support/app.js';
import { runProgram } from '../support/sse.js';
import { Studio } from '../support/studio.js';

const EXAMPLE = join(import.meta.dirname, '../../examples/websocket.mjs');
const QUERIES = ['one', 'Grüße 🌍\u2028 "quoted" \\ \\n %s <b>&amp;\n\ttwo  spaces, end.', 'three'];

let app: TestApp;

beforeAll(async () => {
  app = await startTestApp({ SEED_EXAMPLE: 'true' });
});
afterAll(() => app.close());

const runExample = (server: string, deployment = 'support-desk') =>
  runProgram([process.execPath, EXAMPLE, ...QUERIES], { env: { SERVER: server, DEPLOYMENT: deployment } });

/** Passes connections on to the server; `cutAt` says after how many bytes of answers it cuts one. */
async function startProxy(cutAt: (connection: number) => number | undefined) {
  let connections = 0;
  const open = new Set<Socket>();
  const proxy = createServer((incoming) => {
    const cut = cutAt(connections++) ?? Infinity;
    const outgoing = connect({ host: '127.0.0.1', port: Number(new URL(app.url).port) });
    let passed = 0;
    for (const socket of [incoming, outgoing]) {
      open.add(socket);
      socket.on('error', () => undefined); // it is cut on purpose
      socket.on('close', () => [incoming, outgoing].forEach((each) => each.destroy()));
    }
    incoming.pipe(outgoing);
    outgoing.on('data', (data) => {
      incoming.write(data.subarray(0, cut - passed));
      passed += data.length;
      if (passed >= cut) incoming.end(() => incoming.destroy());
    });
  });
  proxy.listen(0, '127.0.0.1');
  await once(proxy, 'listening');
  const close = async () => {
    open.forEach((socket) => socket.destroy());
    proxy.close();
    await once(proxy, 'close');
  };
  const { port } = proxy.address() as AddressInfo;
  return { url: `http://127.0.0.1:${port}`, close, connections: () => connections };
}

/** What it is to print of the newest executions, in whatever order they end. */
async function shown(): Promise<string[]> {
  const studio = new Studio(app.url);
  const { body } = await studio.json<{ items: { response: string }[] }>('/api/executions?limit=3');
  return body.items.map(({ response }) => response).toSorted();
}
const answersOf = (stdout: string) =>
  stdout
    .split(/^--- query-\d: completed\n/m)
    .slice(1)
    .map((answer) => answer.replace(/\n$/, ''))
    .toSorted();

async function count(): Promise<number> {
  return (await app.database.query('SELECT 1 FROM execution')).length;
}

describe('examples/websocket.mjs', () => {
  it('gets all answers whole though the connection breaks in the handshake, before an answer and inside a frame', async () => {
    const cuts = [60, 260, 3000, 9001];
    const proxy = await startProxy((connection) => cuts[connection]);
    const before = await count();
    try {
      const { code, stdout, stderr } = await runExample(proxy.url);
      expect(stderr).toContain('[no connection]');
      expect(answersOf(stdout)).toEqual(await shown());
      expect(stdout).toContain(QUERIES[1]);
      expect(code).toBe(0);
      expect(proxy.connections()).toBeGreaterThan(cuts.length);
      // Nothing ran twice.
      expect((await count()) - before).toBe(QUERIES.length);
    } finally {
      await proxy.close();
    }
  });

  it('drops what a restarted agent said, and says why a run failed', async () => {
    const scripted = new WebSocketServer({ port: 0, host: '127.0.0.1' });
    scripted.on('connection', (socket) => {
      socket.on('message', (text: Buffer) => {
        const { id } = JSON.parse(text.toString()) as { id: number };
        const send = (message: object) => socket.send(JSON.stringify({ id, ...message }));
        send({ event: 'accepted', data: { execution_id: 'x' } });
        const chunks = [
          { type: 'status', status: 'started', sequence: 1 },
          { type: 'content', data: 'kept ', agent_id: 'a', sequence: 2 },
          { type: 'content', data: 'void', agent_id: 'b', sequence: 3 },
          { type: 'status', status: 'restarted', agent_id: 'b', discard_after: 1, sequence: 4 },
          { type: 'content', data: 'new', agent_id: 'b', sequence: 5 },
          {
            type: 'status',
            status: 'error',
            error: 'The model is "gone".',
            code: 'model_error',
            sequence: 6,
          },
        ];
        for (const data of chunks) send({ event: 'chunk', after: data.sequence, data });
        send({ event: 'end', data: { execution_id: 'x' } });
      });
    });
    await once(scripted, 'listening');
    const { port } = scripted.address() as AddressInfo;
    const { code, stdout, stderr } = await runExample(`http://127.0.0.1:${port}`);
    scripted.close();
    expect(stdout.split('--- ').slice(1)).toContain('query-1: error\nkept new\n');
    expect(stderr).toContain('[query-1: The model is "gone".]');
    expect(code).toBe(1);
  });

  it('says what is wrong with the deployment', async () => {
    const { code, stderr } = await runExample(app.url, 'unknown-desk');
    expect(stderr).toContain('There is no deployment');
    expect(code).toBe(1);
  });
});

import { EventEmitter, once } from 'node:events';
import { connect } from 'node:net';
import { afterAll, afterEach, beforeAll, expect, it } from '@jest/globals';
import { createTestDatabase } from '../support/database.js';
import type { TestDatabase } from '../support/database.js';
import { ServerProcess } from '../support/studio-process.js';
import { Studio, faultsOfStream, textOf, until, upstreamAgent } from '../support/studio.js';
import { Upstream, chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import { WsClient } from '../support/ws-client.js';

const half = Array.from({ length: 30 }, (_, index) => `word ${index} 🙂\n`);
/** `go on` lets the model say the second half of what waits for it. */
const conductor = new EventEmitter().setMaxListeners(0);
let upstream: Upstream;
let database: TestDatabase;
const servers: ServerProcess[] = [];

beforeAll(async () => {
  upstream = await Upstream.start(async (response) => {
    writeStream(response, ...half.map(chatDelta));
    await once(conductor, 'go on');
    writeStream(response, ...half.map(chatDelta), chatEnd());
    response.end();
  });
  database = await createTestDatabase();
});
afterEach(() => Promise.all(servers.splice(0).map((server) => server.stop('SIGKILL'))));
afterAll(async () => {
  await database.drop();
  await upstream.stop();
});

async function start(env: Record<string, string> = {}): Promise<ServerProcess> {
  const provider = { type: 'openai-compatible', base_url: upstream.url };
  const MODEL_PROVIDERS = JSON.stringify({ upstream: provider });
  const server = await ServerProcess.start({ DATABASE_URL: database.url, MODEL_PROVIDERS, ...env });
  servers.push(server);
  return server;
}

it('a server that shuts down closes its sockets with 1001, and another one has the rest of all streams to the byte', async () => {
  const drained = await start({ ROLE: 'api' });
  const other = await start({ ROLE: 'api' });
  await start({ ROLE: 'worker' });
  const deployment = await new Studio(drained.url).deploy(upstreamAgent());
  const client = await WsClient.open(drained.url);
  const begun = await Promise.all(
    Array.from({ length: 20 }, () => client.execute({ deployment_name: deployment, query: 'x' })),
  );
  await client.until(() => begun.every(({ id }) => client.frames(id).length === half.length + 1));
  const stopped = drained.stop();
  expect(await client.over()).toEqual({ code: 1001, reason: expect.stringContaining('Connect again') });
  expect(client.answers.some(({ event }) => event === 'end' || event === 'error')).toBe(false);
  await stopped;
  expect(drained.process.exitCode).toBe(0);

  conductor.emit('go on');
  const again = await WsClient.open(other.url);
  for (const { id, executionId } of begun) {
    const head = client.frames(id);
    const { id: rest } = await again.ask('subscribe', { execution_id: executionId, after: head.length });
    const frames = [...head, ...(await again.whole(String(rest)))];
    expect(faultsOfStream(frames, executionId)).toEqual([]);
    expect(textOf(frames)).toBe(half.join('').repeat(2));
    const sse = await (await new Studio(other.url).follow(executionId)).frames();
    expect(frames.map(({ data }) => data)).toEqual(sse.map(({ data }) => data));
  }
  await again.close();
}, 60_000);

it('a socket that does not answer its close does not hold up the shutdown', async () => {
  const server = await start();
  const client = await WsClient.open(server.url);
  client.socket.pause();
  await server.stop();
  expect(server.process.exitCode).toBe(0);
  client.reset();
});

it('a socket that is opened during the shutdown is refused with 503 and told when to come again', async () => {
  const server = await start({ SHUTDOWN_GRACE_MS: '0' });
  const client = await WsClient.open(server.url);
  // The shutdown waits for the first one, and the second one has its connection already.
  client.socket.pause();
  const { hostname, port } = new URL(server.url);
  const late = connect({ host: hostname, port: Number(port) });
  let received = '';
  late.setEncoding('utf8').on('data', (text: string) => (received += text));
  late.write('GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n');
  await until(() => received.includes('"status"'));
  server.process.kill('SIGTERM');
  const refusedAt = () => received.indexOf('HTTP/1.1 503');
  const handshake = [
    'GET /api/ws HTTP/1.1',
    'Host: x',
    'Connection: Upgrade',
    'Upgrade: websocket',
    'Sec-WebSocket-Version: 13',
    'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==',
  ];
  // The listener is closed as soon as no new connection is taken any more.
  await until(async () => {
    const probe = connect({ host: hostname, port: Number(port) });
    const refused = await new Promise<boolean>((resolve) => {
      probe.on('connect', () => resolve(false)).on('error', () => resolve(true));
    });
    probe.destroy();
    return refused;
  });
  late.write(`${handshake.join('\r\n')}\r\n\r\n`);
  await until(() => refusedAt() > 0);
  expect(received.slice(refusedAt())).toMatch(/Retry-After: 1/);
  expect(received.slice(refusedAt())).toMatch(/"code":"unavailable"/);
  late.destroy();
  client.reset();
  await server.stop();
});

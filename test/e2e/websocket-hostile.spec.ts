import { request as httpRequest } from 'node:http';
import type { IncomingMessage } from 'node:http';
import { connect } from 'node:net';
import type { Socket } from 'node:net';
import { afterEach, beforeAll, describe, expect, it } from '@jest/globals';
import { itInFull, rounds } from '../support/effort.js';
import { echo, until } from '../support/studio.js';
import { withStudio } from '../support/with-studio.js';
import { WsClient } from '../support/ws-client.js';

const MAX_BODY_BYTES = 1_048_576;
const KEY = 'dGhlIHNhbXBsZSBub25jZQ==';
const HANDSHAKE = {
  connection: 'Upgrade',
  upgrade: 'websocket',
  'sec-websocket-version': '13',
  'sec-websocket-key': KEY,
};

const app = withStudio({
  others: {
    strict: { ROLE: 'api', CORS_ORIGINS: 'https://app.example, http://127.0.0.1:3000' },
    worker: { ROLE: 'worker' },
  },
});
const { studio } = app;
const { strict, worker } = app.others;
let deployment: string;

beforeAll(async () => {
  deployment = await studio.deploy(echo());
});
afterEach(async () => {
  await until(async () => (await studio.metric('agent_studio_open_websockets')) === 0);
  expect(await studio.metric('agent_studio_websocket_subscriptions')).toBe(0);
  expect((await studio.json('/health/live')).status).toBe(200);
});

interface HandshakeAnswer {
  status: number;
  headers: IncomingMessage['headers'];
  body: Record<string, unknown>;
}

/** A request with these headers; resolves with the answer, whether it is an upgrade or not. */
async function handshake(
  url: string,
  headers: Record<string, string> = {},
  method = 'GET',
): Promise<HandshakeAnswer> {
  const request = httpRequest(url, { method, headers: { ...HANDSHAKE, ...headers }, agent: false }).end();
  return new Promise((resolve, reject) => {
    request.on('error', reject);
    request.on('upgrade', (answer, socket: Socket) => {
      socket.destroy();
      resolve({ status: answer.statusCode ?? 0, headers: answer.headers, body: {} });
    });
    request.on('response', (answer) => {
      let text = '';
      answer.setEncoding('utf8').on('data', (piece: string) => (text += piece));
      answer.on('end', () => {
        const body = JSON.parse(text) as Record<string, unknown>;
        resolve({ status: answer.statusCode ?? 0, headers: answer.headers, body });
      });
    });
  });
}

describe('a handshake', () => {
  it.each(['https://evil.example', 'https://app.example.evil.example', 'http://127.0.0.1:3001', 'null', ''])(
    'of a page of another origin (%j) is refused before the upgrade',
    async (origin) => {
      const { status, headers, body } = await handshake(`${strict.url}/api/ws`, { origin });
      expect({ status, body }).toMatchObject({
        status: 403,
        body: { code: 'origin_not_allowed', instance: '/api/ws' },
      });
      expect(headers['content-type']).toMatch('application/problem+json');
      expect(headers['x-request-id']).toBe(body['request_id']);
    },
  );

  it('of an allowed origin, of none, and of any where all are allowed, is taken', async () => {
    for (const [url, headers] of [
      [strict.url, { origin: 'https://app.example' }],
      [strict.url, { origin: 'http://127.0.0.1:3000' }],
      [strict.url, {}],
      [app.url, { origin: 'https://evil.example' }],
    ] as [string, Record<string, string>][]) {
      const answer = await handshake(`${url}/api/ws`, { ...headers, 'x-request-id': 'mine' });
      expect(answer).toMatchObject({ status: 101, headers: { 'x-request-id': 'mine' } });
    }
  });

  it('at another address, or at a worker, gets 404 and not a bare end', async () => {
    for (const url of [`${app.url}/api`, `${app.url}/api/ws/more`, `${app.url}/`, `${worker.url}/api/ws`]) {
      expect(await handshake(url)).toMatchObject({ status: 404, body: { code: 'not_found' } });
    }
    expect(await handshake(`${app.url}/api/ws?token=x`)).toMatchObject({ status: 101 });
  });

  it('that is none is told what is wrong with it', async () => {
    const url = `${app.url}/api/ws`;
    const faulty: Record<string, string>[] = [
      { 'sec-websocket-version': '7' },
      { 'sec-websocket-key': 'short' },
    ];
    for (const headers of faulty) {
      const { status, body, headers: answered } = await handshake(url, headers);
      expect({ status, body }).toMatchObject({ status: 400, body: { code: 'validation_failed' } });
      expect(answered['sec-websocket-version']).toBe('13');
    }
    expect((await handshake(url, {}, 'POST')).status).toBe(400);
  });

  it('to HTTP/2, which some clients offer with every request, is ignored', async () => {
    const headers = {
      upgrade: 'h2c',
      connection: 'Upgrade, HTTP2-Settings',
      'http2-settings': 'AAMAAABkAAQAAP__',
    };
    const answer = await handshake(`${app.url}/api/workflows/deployments/active`, headers);
    expect(answer.status).toBe(200);
    expect(answer.body).toMatchObject([{ deployment_name: deployment }]);
  });
});

/** A frame of a client, masked with zeros; `first` is its first byte. */
function frame(first: number, payload: Buffer): Buffer {
  const { length } = payload;
  const head =
    length < 126
      ? Buffer.from([first, 0x80 | length])
      : Buffer.concat([Buffer.from([first, 0x80 | 126]), Buffer.from([length >> 8, length & 255])]);
  return Buffer.concat([head, Buffer.alloc(4), payload]);
}

/** A connection after its handshake, for frames that no library sends. Resolves with the code that the server closes it with. */
async function closeCodeAfter(...frames: Buffer[]): Promise<number> {
  const { hostname, port } = new URL(app.url);
  const socket = connect({ host: hostname, port: Number(port) });
  const head = Object.entries(HANDSHAKE).map(([name, value]) => `${name}: ${value}\r\n`);
  socket.write(`GET /api/ws HTTP/1.1\r\nHost: x\r\n${head.join('')}\r\n`);
  let received = Buffer.alloc(0);
  socket.on('data', (data) => (received = Buffer.concat([received, data])));
  socket.on('error', () => undefined); // the server may have cut it, which the close code tells, too
  for (const data of frames) socket.write(data);
  await until(() => received.includes('\r\n\r\n') && received.at(received.indexOf('\r\n\r\n') + 4) === 0x88);
  const at = received.indexOf('\r\n\r\n') + 4;
  const code = received.readUInt16BE(at + 2);
  socket.destroy();
  return code;
}

describe('what is no message closes the socket with the code that says why', () => {
  const text = (content: string) => frame(0x81, Buffer.from(content));
  it.each<[string, number, Buffer[]]>([
    ['a binary message', 1003, [frame(0x82, Buffer.from('{"event":"ping"}'))]],
    ['bytes that are no UTF-8', 1007, [frame(0x81, Buffer.from([0x22, 0xc3, 0x28, 0x22]))]],
    ['text that is no JSON', 1007, [text('ping')]],
    ['an empty message', 1007, [text('')]],
    ['half of a JSON text', 1007, [text('{"event":"ping"')]],
    ['reserved bits', 1002, [frame(0xf1, Buffer.from('{"event":"ping"}'))]],
    ['an unknown opcode', 1002, [frame(0x83, Buffer.alloc(0))]],
    ['a frame without a mask', 1002, [Buffer.from([0x81, 0x01, 0x7b])]],
    ['a continuation of nothing', 1002, [frame(0x80, Buffer.from('x'))]],
    ['a ping of more than 125 bytes', 1002, [frame(0x89, Buffer.alloc(200))]],
    [
      'fragments without end',
      1008,
      [
        Buffer.concat([
          frame(0x01, Buffer.from('{')),
          ...Array<Buffer>(17_000).fill(frame(0x00, Buffer.alloc(0))),
        ]),
      ],
    ],
  ])('%s', async (_name, code, frames) => {
    expect(await closeCodeAfter(...frames)).toBe(code);
  });

  it('a message above the limit, in one frame or in many', async () => {
    const pad = (bytes: number) => `{"event":"ping","data":{"x":"${'x'.repeat(bytes)}"}}`;
    for (const [bytes, code] of [
      [MAX_BODY_BYTES - 100, undefined],
      [MAX_BODY_BYTES, 1009],
    ] as const) {
      const client = await WsClient.open(app.url);
      client.sendText(pad(bytes));
      if (code === undefined) {
        expect((await client.answer(({ event }) => event === 'error')).data['code']).toBe(
          'validation_failed',
        );
        await client.close();
      } else expect((await client.over()).code).toBe(code);
    }
    const client = await WsClient.open(app.url);
    for (let sent = 0; sent <= MAX_BODY_BYTES; sent += 65_536)
      client.webSocket.send('x'.repeat(65_536), { fin: false });
    expect((await client.over()).code).toBe(1009);
  });
});

describe('a message that is none of ours is refused, and the socket lives on', () => {
  const nested = (depth: number) => `${'{"a":'.repeat(depth)}1${'}'.repeat(depth)}`;
  it.each([
    ['null', ''],
    ['[]', ''],
    ['"ping"', ''],
    ['{}', '/event'],
    ['{"event":1}', '/event'],
    ['{"event":"__proto__"}', '/event'],
    ['{"event":"constructor"}', '/event'],
    ['{"event":"ping","id":{}}', '/id'],
    ['{"event":"ping","id":1e999}', '/id'],
    [`{"event":"ping","id":"${'x'.repeat(201)}"}`, '/id'],
    ['{"event":"ping","__proto__":{"polluted":true}}', '/__proto__'],
    ['{"event":"ping","data":{"a":[{"__proto__":{"polluted":true}}]}}', '/data/a/0/__proto__'],
    ['{"event":"execute","data":{"constructor":{"prototype":{"polluted":true}}}}', '/data/constructor'],
    [`{"event":"execute","data":${nested(40)}}`, `/data${'/a'.repeat(32)}`],
    ['90,000 LEVELS', `/data${'/a'.repeat(32)}`],
    ['{"event":"execute","data":[]}', '/data/deployment_name'],
  ])('%s', async (text, pointer) => {
    const client = await WsClient.open(app.url);
    client.sendText(text === '90,000 LEVELS' ? `{"event":"execute","data":${nested(90_000)}}` : text);
    const { data } = await client.answer(({ event }) => event === 'error');
    expect(data).toMatchObject({
      code: 'validation_failed',
      errors: expect.arrayContaining([expect.objectContaining({ pointer })]),
    });
    expect(({} as Record<string, unknown>)['polluted']).toBeUndefined();
    expect((await client.ask('ping')).event).toBe('pong');
    await client.close();
  });
});

const PINGS = rounds(10_000, 1000);

it(`${PINGS} pings at once, of either kind, are answered or put together, and the next message is`, async () => {
  const client = await WsClient.open(app.url);
  for (let count = 0; count < PINGS; count++) client.webSocket.ping();
  const ids = Array.from({ length: PINGS }, () => client.send('ping'));
  await client.answer(({ id }) => id === ids.at(-1));
  expect(client.answers.map(({ id }) => id)).toEqual(ids);
  expect(client.pongs).toBeGreaterThan(0);
  await client.close();
});

itInFull(
  'a client that asks on and on and reads nothing is not read any more',
  async () => {
    const client = await WsClient.open(app.url);
    client.socket.pause();
    const message = JSON.stringify({ event: 'dance'.repeat(200), id: 'x'.repeat(200) });
    // More than what all buffers on the way hold: it stays unsent once the server has stopped reading.
    const unsent = () => client.webSocket.bufferedAmount;
    let sent = 0;
    await until(async () => {
      const before = unsent();
      for (let count = 0; count < 500; count++, sent++) client.sendText(message);
      await new Promise((resolve) => setImmediate(resolve));
      return before > 8 * MAX_BODY_BYTES;
    });
    client.socket.resume();
    // It is read on as soon as it reads.
    await client.until(() => client.answers.length === sent);
    await client.close();
  },
  60_000,
);

it('a deep, a huge and a hostile text leave the answers to others alone', async () => {
  const [hostile, other] = [await WsClient.open(app.url), await WsClient.open(app.url)];
  for (let round = 0; round < rounds(20, 5); round++) {
    hostile.sendText(`{"event":"execute","data":${'['.repeat(500_000)}${']'.repeat(500_000)}}`);
    const { id, executionId } = await other.execute({ deployment_name: deployment, query: 'x' });
    expect((await other.whole(id)).at(-1)?.chunk).toMatchObject({
      status: 'completed',
      execution_id: executionId,
    });
  }
  await Promise.all([hostile, other].map((client) => client.close()));
});

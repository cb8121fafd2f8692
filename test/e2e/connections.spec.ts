import { once } from 'node:events';
import type { Server } from 'node:http';
import { connect } from 'node:net';
import type { Socket } from 'node:net';
import { describe, expect, it } from '@jest/globals';
import { ERROR_CODES } from '../../src/errors.js';
import type { ProblemDto } from '../../src/problem.dto.js';
import { cheap, itInFull } from '../support/effort.js';
import { echo, until } from '../support/studio.js';
import { withStudio } from '../support/with-studio.js';

const REQUEST_TIMEOUT_MS = '2000';
const ANSWER_TIMEOUT_MS = '500';
const MAX_CLIENT_CONNECTIONS = '20';

const system = withStudio({ env: { REQUEST_TIMEOUT_MS, ANSWER_TIMEOUT_MS, MAX_CLIENT_CONNECTIONS } });
const { studio } = system;

async function open(): Promise<Socket> {
  const socket = connect(Number(new URL(system.url).port), '127.0.0.1');
  socket.on('error', () => undefined); // a reset is an end, too
  await once(socket, 'connect');
  return socket;
}

/** All that comes until the server closes the connection. */
async function everything(socket: Socket): Promise<string> {
  let text = '';
  socket.setEncoding('utf8').on('data', (piece: string) => (text += piece));
  await once(socket, 'close');
  return text;
}

/** The one problem document that came last. */
function problemIn(text: string): ProblemDto {
  expect(text).toContain('Content-Type: application/problem+json');
  const problem = JSON.parse(text.slice(text.lastIndexOf('\r\n\r\n') + 4)) as ProblemDto;
  expect(text).toContain(`HTTP/1.1 ${problem.status} `);
  expect(problem.status).toBe(ERROR_CODES[problem.code].status);
  return problem;
}

const POST = 'POST /api/workflows/execute HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n';

describe('a client that keeps a connection busy with nothing', () => {
  const requests = [
    { name: 'whose head never ends', begin: `${POST}X-Slow: `, drop: '5', isDear: true },
    { name: 'whose body never ends', begin: `${POST}Content-Length: 1000\r\n\r\n{"query": "`, drop: '5' },
    {
      name: 'whose chunks never end',
      begin: `${POST}Transfer-Encoding: chunked\r\n\r\n5\r\n{"que\r\n`,
      drop: '1\r\n5\r\n',
      isDear: true,
    },
  ];
  it.each(cheap(requests))('is told so and cut off: a request $name', async ({ begin, drop }) => {
    const socket = await open();
    socket.write(begin);
    const drip = setInterval(() => socket.write(drop), 50);
    const answer = await everything(socket);
    clearInterval(drip);
    expect(problemIn(answer).code).toBe('request_timeout');
  });

  itInFull('is cut off when it does not read a complete answer', async () => {
    const { body } = await studio.json<{ workflow_id: string }>('/api/workflows', {
      method: 'POST',
      body: { name: 'large', configuration: echo() },
    });
    await system.database.query(
      `INSERT INTO workflow (workflow_id, name, version, configuration, is_active, created_at, updated_at)
       SELECT gen_random_uuid(), name, 'copy' || n, jsonb_build_object('text', repeat('x', 900000)), is_active, created_at, updated_at
         FROM workflow, generate_series(1, 30) AS n WHERE workflow_id = $1`,
      [body.workflow_id],
    );
    const server = system.app.getHttpServer() as Server;
    const [[accepted], client] = await Promise.all([once(server, 'connection') as Promise<[Socket]>, open()]);
    client.pause();
    client.write('GET /api/workflows HTTP/1.1\r\nHost: x\r\n\r\n');
    await until(() => accepted.writableLength > 0);
    await until(() => accepted.destroyed);
    client.destroy();
  });
});

const connections = () =>
  new Promise<number>((resolve, reject) => {
    (system.app.getHttpServer() as Server).getConnections((error, count) => {
      if (error) reject(error);
      else resolve(count);
    });
  });

describe('what is no request is answered with a problem', () => {
  it.each([
    ['bad_request', 'nonsense\r\n\r\n'],
    ['bad_request', 'GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n'],
    ['bad_request', `${POST}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n`],
    ['bad_request', `${POST}Transfer-Encoding: chunked\r\n\r\nzz\r\n`],
    ['bad_request', 'GET / HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n'],
    ['headers_too_large', `GET / HTTP/1.1\r\nHost: x\r\nLast-Event-ID: ${'x'.repeat(17_000)}\r\n\r\n`],
    ['headers_too_large', `GET /${'x'.repeat(17_000)} HTTP/1.1\r\nHost: x\r\n\r\n`],
  ])('%s: %j', async (code, request) => {
    const socket = await open();
    socket.write(request);
    expect(problemIn(await everything(socket)).code).toBe(code);
  });
});

it('a client that takes all connections is refused further ones, and others are served once it lets go', async () => {
  const before = await studio.metric('agent_studio_dropped_connections_total');
  const sockets: Socket[] = [];
  for (let index = 0; index < 30; index++) sockets.push(await open());
  await until(() => sockets.filter(({ closed }) => closed).length >= 10);
  for (const socket of sockets) socket.destroy();
  await until(async () => (await connections()) < 5);
  const dropped = (await studio.metric('agent_studio_dropped_connections_total')) - before;
  expect(dropped).toBeGreaterThanOrEqual(10);
});

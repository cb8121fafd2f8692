import { once } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import type { ServerResponse } from 'node:http';
import { connect } from 'node:net';
import type { Socket } from 'node:net';
import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { createTestDatabase } from '../support/database.js';
import type { TestDatabase } from '../support/database.js';
import { ServerProcess } from '../support/studio-process.js';
import { Studio, until, untilPasses, upstreamAgent } from '../support/studio.js';
import { Upstream, chatDelta, writeStream } from '../support/upstream.js';
import { WsClient } from '../support/ws-client.js';

const MIB = 1024 * 1024;
/** After so long nothing may be left of hundreds of clients. */
const FREED_MS = 60_000;
/** Counting objects takes seconds where others use the processor, too. */
const COUNTED_MS = 60_000;
const WAVES = 3;
/** Clients of a wave that leave in the middle of their streams, and as many that leave before the first byte of them. */
const HALF_WAVE = 25;
/** Long enough for the server to be at something else by then; a peer may take three times as long. */
const PONG_DELAY_MS = 30;
/** How long what a client does not read may take to fill the buffers on its way. */
const FILLED_MS = 3000;
/** More than two beats. */
const HELD_UP_MS = 2200;
/** Timers and sockets that the pools, the queue and the notifications open and close by themselves. */
const OWN_TRAFFIC = 10;

let upstream: Upstream;
let database: TestDatabase;
let server: ServerProcess;
let deployment: string;
/** Answers of the model that have begun and say nothing more. */
const silent: ServerResponse[] = [];

beforeAll(async () => {
  upstream = await Upstream.start((response, { body }) => {
    const query = (body.messages as { content: string }[]).at(-1)?.content ?? '';
    if (query !== 'mute') writeStream(response, chatDelta('word'));
    // More than all buffers on the way to a client hold: Linux lets a socket that nobody reads grow to 32 MiB.
    if (query === 'flood') writeStream(response, ...Array<string>(48).fill(chatDelta('x'.repeat(MIB))));
    silent.push(response);
  });
  database = await createTestDatabase();
  server = await startServer({ HEARTBEAT_INTERVAL_MS: '3600000' });
  deployment = await new Studio(server.url).deploy(upstreamAgent());
});
afterAll(async () => {
  await server.stop('SIGKILL');
  await database.drop();
  await upstream.stop();
});

function startServer(env: Record<string, string>): Promise<ServerProcess> {
  const provider = { type: 'openai-compatible', base_url: upstream.url, timeout_ms: 600_000 };
  return ServerProcess.start({
    DATABASE_URL: database.url,
    MODEL_PROVIDERS: JSON.stringify({ upstream: provider }),
    WORKER_CONCURRENCY: '5000',
    DATABASE_TIMEOUT_MS: '600000',
    ...env,
  });
}

/** What a server has open for clients: exact, and each of it 0 in a server that has none. */
async function openFor(of: ServerProcess) {
  const counted = await database.query('SELECT 1 FROM execution_subscriber WHERE count > 0');
  return {
    sockets: await of.metric('agent_studio_open_websockets'),
    subscriptions: await of.metric('agent_studio_websocket_subscriptions'),
    tcp: await of.clientConnections(),
    subscribers: counted.length,
  };
}

/** What it has in memory for them. Counting takes seconds, in which it does nothing else. */
async function heldFor(of: ServerProcess) {
  return {
    readers: (await of.held('event-log/log-subscriptions.js', 'LogSubscription')).count,
    connections: (await of.held('websocket/client-connection.js', 'ClientConnection')).count,
  };
}

const NOTHING = { sockets: 0, subscriptions: 0, tcp: 0, subscribers: 0 };
const NOTHING_HELD = { readers: 0, connections: 0 };

const untilOpen = (expected: Partial<typeof NOTHING>, of = server) =>
  untilPasses(async () => expect(await openFor(of)).toMatchObject(expected), COUNTED_MS);
const untilHeld = (expected: Partial<typeof NOTHING_HELD>, of = server) =>
  untilPasses(async () => expect(await heldFor(of)).toMatchObject(expected), COUNTED_MS);

/** A client in the middle of a stream. */
async function inTheMiddle(query = 'silent'): Promise<WsClient> {
  const client = await WsClient.open(server.url);
  const { id } = await client.execute({ deployment_name: deployment, query });
  await client.until(() => client.frames(id).length >= 2);
  return client;
}

describe('of a client that leaves nothing is kept', () => {
  const farewells: [string, (client: WsClient) => unknown][] = [
    ['with a close frame', (client) => client.webSocket.close()],
    ['with a bare end (FIN)', (client) => client.socket.end()],
    ['with a reset (RST)', (client) => client.reset()],
  ];

  it('though it is counted while it is there', async () => {
    const client = await inTheMiddle();
    await untilOpen({ sockets: 1, subscriptions: 1, subscribers: 1 });
    await untilHeld({ readers: 1, connections: 1 });
    client.reset();
    await untilOpen({ sockets: 0, subscriptions: 0 });
  });

  it.each(farewells)('%s, while nothing happens', async (_name, leave) => {
    const client = await inTheMiddle();
    await untilOpen({ sockets: 1, subscriptions: 1 });
    leave(client);
    await untilOpen(NOTHING);
  });

  it('with a reset (RST), in the middle of a stream that it does not read', async () => {
    const client = await inTheMiddle('flood');
    client.socket.pause();
    await sleep(FILLED_MS);
    await untilOpen({ sockets: 1, subscriptions: 1 });
    client.reset();
    await untilOpen(NOTHING);
  });

  it('while the database holds up what it asked for', async () => {
    const earlier = upstream.requests.length;
    const client = await WsClient.open(server.url);
    await database.whileLocked('execution', 'SHARE', async () => {
      for (let count = 0; count < 5; count++)
        client.send('execute', { deployment_name: deployment, query: 'mute' });
      await untilHeldUp(5);
      client.reset();
      await untilOpen({ sockets: 0, subscriptions: 0, tcp: 0 });
    });
    await upstream.request(earlier + 4); // they were accepted, and run without their client
    await untilOpen(NOTHING);
  });

  it('in the middle of its handshake', async () => {
    const { hostname, port } = new URL(server.url);
    const sockets = Array.from({ length: 20 }, (): Socket => connect({ host: hostname, port: Number(port) }));
    for (const socket of sockets) {
      socket.write('GET /api/ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n');
    }
    await until(async () => (await server.clientConnections()) >= 20);
    sockets.forEach((socket) => socket.resetAndDestroy());
    await untilOpen(NOTHING);
  });

  it('and none of them is in memory any more', () => untilHeld(NOTHING_HELD));
});

/** Resolves when so many executions wait in the database for their acceptance. */
const untilHeldUp = (count: number) =>
  until(async () => {
    const waiting = await database.query(
      `SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%INSERT INTO execution (%' AND pid <> pg_backend_pid()`,
    );
    return waiting.length >= count;
  });

async function openInAll(of: ServerProcess) {
  return {
    descriptors: await of.openDescriptors(),
    sockets: await of.metric('nodejs_active_resources', '{type="TCPSocketWrap"}'),
    timers: await of.metric('nodejs_active_resources', '{type="Timeout"}'),
  };
}

it('hundreds of clients that are reset, half of them before anything of their streams came, leave nothing behind', async () => {
  const wave = async () => {
    const middle = await Promise.all(Array.from({ length: HALF_WAVE }, () => inTheMiddle()));
    const beginning = await Promise.all(Array.from({ length: HALF_WAVE }, () => WsClient.open(server.url)));
    await database.whileLocked('execution', 'SHARE', async () => {
      for (const client of beginning) client.send('execute', { deployment_name: deployment, query: 'mute' });
      await untilHeldUp(8); // the pool's connections
      expect(beginning.every(({ answers }) => answers.length === 0)).toBe(true);
      const handshakes = Array.from({ length: 5 }, () => WsClient.begin(server.url));
      for (const client of [...middle, ...beginning]) client.reset();
      handshakes.forEach(({ webSocket }) => webSocket.terminate());
    });
  };
  await wave(); // so that the pools have the size that a wave takes
  await untilOpen(NOTHING);
  const before = await openInAll(server);
  for (let count = 0; count < WAVES; count++) await wave();
  await untilPasses(async () => {
    for (const name of ['open_websockets', 'websocket_subscriptions']) {
      expect(await server.metric(`agent_studio_${name}`)).toBe(0);
    }
  }, FREED_MS);
  await untilPasses(async () => {
    expect(await openFor(server)).toEqual(NOTHING);
    const after = await openInAll(server);
    // Each of them has a run that goes on without it, with a connection to the model.
    const runs = upstream.openConnections;
    expect(after.descriptors).toBeLessThan(before.descriptors + runs + OWN_TRAFFIC);
    expect(after.sockets).toBeLessThan(before.sockets + runs + OWN_TRAFFIC);
  }, COUNTED_MS);
  await untilHeld(NOTHING_HELD);
}, 180_000);

describe('a peer', () => {
  it('that answers no ping and reads nothing is let go, one that answers is not', async () => {
    const quick = await startServer({ HEARTBEAT_INTERVAL_MS: '1000', ROLE: 'api' });
    try {
      const dead = await WsClient.open(quick.url, { autoPong: false });
      const alive = await WsClient.open(quick.url);
      let pings = 0;
      alive.webSocket.on('ping', () => pings++);
      expect((await dead.over()).code).toBe(1006);
      await until(() => pings >= 3);
      expect((await alive.ask('ping')).event).toBe('pong');
      await alive.close();
      await untilOpen({ sockets: 0, subscriptions: 0, tcp: 0 }, quick);
      await untilHeld({ connections: 0 }, quick);
    } finally {
      await quick.stop('SIGKILL');
    }
  });

  it('is not taken for dead because the server itself was held up', async () => {
    const busy = await startServer({ HEARTBEAT_INTERVAL_MS: '1000', ROLE: 'api' });
    try {
      const client = await WsClient.open(busy.url, { autoPong: false });
      client.webSocket.on('ping', (payload) => {
        setTimeout(() => client.webSocket.pong(payload), PONG_DELAY_MS);
      });
      for (let round = 0; round < 3; round++) {
        await once(client.webSocket, 'ping');
        // The answer comes in time, and waits until after its next beat.
        busy.process.kill('SIGSTOP');
        await sleep(HELD_UP_MS);
        busy.process.kill('SIGCONT');
        expect((await client.ask('ping')).event).toBe('pong');
      }
      await client.close();
    } finally {
      await busy.stop('SIGKILL');
    }
  });
});

import { EventEmitter, once } from 'node:events';
import type { ServerResponse } from 'node:http';
import { connect } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import fc from 'fast-check';
import { createTestDatabase } from '../support/database.js';
import type { TestDatabase } from '../support/database.js';
import { RawClient } from '../support/raw-client.js';
import { ServerProcess } from '../support/studio-process.js';
import { Studio, faultsOfStream, textOf, until, untilPasses, upstreamAgent } from '../support/studio.js';
import { Upstream, chatDelta, chatEnd, writeStream } from '../support/upstream.js';

const MIB = 1024 * 1024;
/** After so long nothing may be left of hundreds of clients. */
const FREED_MS = 60_000;
const WAVES = 3;
/** Clients of a wave that leave in the middle of their stream, and as many that leave before its first byte. */
const HALF_WAVE = 25;
/** Timers and sockets that the pools, the queue and the notifications open and close by themselves. */
const OWN_TRAFFIC = 10;
/** Frames and words that the model has said before it waits for the readers to leave. */
const LEAVE_BY = 50;
const words = Array.from({ length: 60 }, (_, index) => `word ${index} `);

let upstream: Upstream;
let database: TestDatabase;
let server: ServerProcess;
let deployment: string;
/** Answers of the model that have begun and say nothing more. */
const silent: ServerResponse[] = [];
/** Tells the model when to `begin` and when to `finish`; by the query. */
const conductors = new Map<string, EventEmitter>();

beforeAll(async () => {
  upstream = await Upstream.start(async (response, { body }) => {
    const query = (body.messages as { content: string }[]).at(-1)?.content ?? '';
    const conductor = conductors.get(query);
    if (conductor) return speak(response, conductor);
    if (query !== 'mute') writeStream(response, chatDelta('word'));
    // More than all buffers on the way to a client hold.
    if (query === 'flood') writeStream(response, ...Array<string>(16).fill(chatDelta('x'.repeat(MIB))));
    return silent.push(response);
  });
  database = await createTestDatabase();
  server = await startServer({});
  deployment = await new Studio(server.url).deploy(upstreamAgent());
});
afterAll(async () => {
  await server.stop('SIGKILL');
  await database.drop();
  await upstream.stop();
});

/** A server that sends nothing of its own accord, and whose model may be silent for as long as it likes. */
function startServer(env: Record<string, string>): Promise<ServerProcess> {
  const provider = { type: 'openai-compatible', base_url: upstream.url, timeout_ms: 600_000 };
  return ServerProcess.start({
    DATABASE_URL: database.url,
    MODEL_PROVIDERS: JSON.stringify({ upstream: provider }),
    HEARTBEAT_INTERVAL_MS: '3600000',
    STREAM_FLUSH_INTERVAL_MS: '1',
    // The database is held up on purpose, for as long as it takes to look at everything.
    DATABASE_TIMEOUT_MS: '600000',
    ...env,
  });
}

/** Says a word, when told to begin {@link LEAVE_BY}, and when told to finish all of them. */
async function speak(response: ServerResponse, conductor: EventEmitter): Promise<void> {
  const [begin, finish] = [once(conductor, 'begin'), once(conductor, 'finish')];
  for (const [index, word] of words.entries()) {
    if (index === 1) await begin;
    if (index === LEAVE_BY) await finish;
    writeStream(response, chatDelta(word));
    await sleep(1); // a word at a time
  }
  writeStream(response, chatEnd());
  response.end();
}

const request = (query: string) => ({ deployment_name: deployment, query });
const execute = (query: string) => new RawClient(`${server.url}/api/workflows/execute`, request(query));
const stream = (query: string, from = server) =>
  new RawClient(`${from.url}/api/workflows/execute/stream`, request(query));
const follow = (executionId: string) => new RawClient(`${server.url}/api/executions/${executionId}/stream`);

describe('four of five readers leave at random moments and the fifth has everything', () => {
  const leaver = fc.record({ after: fc.integer({ min: 2, max: LEAVE_BY }), resets: fc.boolean() });
  const leavers = fc.array(leaver, { minLength: 4, maxLength: 4 });
  let rounds = 0;

  it.each([
    ['the client that started the execution stays', 0],
    ['the client that started the execution leaves', 4],
  ])('%s', async (_name, indexOfFifth) => {
    const round = async (leaving: { after: number; resets: boolean }[]) => {
      const query = `speak ${++rounds}`;
      const conductor = new EventEmitter();
      conductors.set(query, conductor);
      const starter = stream(query);
      await starter.read(2);
      const { executionId } = starter;
      const clients = [starter, ...leaving.map(() => follow(executionId))];
      await Promise.all(clients.map((client) => client.read(2)));
      const [fifth] = clients.splice(indexOfFifth, 1);
      const left = clients.map(async (client, index) => {
        await client.read(leaving[index]?.after ?? 0);
        expect(client.isOver).toBe(false);
        if (leaving[index]?.resets) client.reset();
        else client.close();
      });
      conductor.emit('begin');
      await Promise.all(left);
      conductor.emit('finish');
      const frames = (await fifth?.whole()) ?? [];
      expect(faultsOfStream(frames, executionId)).toEqual([]);
      expect(textOf(frames)).toBe(words.join(''));
    };
    await fc.assert(fc.asyncProperty(leavers, round), { numRuns: 5, endOnFailure: true, timeout: 60_000 });
  });
});

/** What a server has open for clients: exact, and each of it 0 in a server that has none. */
async function openFor(of: ServerProcess) {
  const counted = await database.query('SELECT 1 FROM execution_subscriber WHERE count > 0');
  return {
    connections: await of.clientConnections(),
    streams: await of.metric('agent_studio_open_streams'),
    subscribers: counted.length,
  };
}

/** What it has in memory for them. Counting takes seconds, in which it does nothing else. */
async function heldFor(of: ServerProcess) {
  return {
    // The two that are always there are the prototypes that Express makes of the class.
    responses: (await of.held('node:http', 'ServerResponse')).count - 2,
    readers: (await of.held('event-log/log-subscriptions.js', 'LogSubscription')).count,
  };
}

const NOTHING = { connections: 0, streams: 0, subscribers: 0 };
const NOTHING_HELD = { responses: 0, readers: 0 };

const untilOpen = (expected: typeof NOTHING, of = server) =>
  untilPasses(async () => expect(await openFor(of)).toEqual(expected));
const untilHeld = (expected: typeof NOTHING_HELD, of = server) =>
  untilPasses(async () => expect(await heldFor(of)).toEqual(expected));

/** Part of the statement that accepts an execution. */
const INSERT = 'INSERT INTO execution (';

describe('a client that vanishes while nothing happens is noticed, and nothing is kept for it', () => {
  const ONE_STREAM = { connections: 1, streams: 1, subscribers: 1 };
  const ONE_WAITING = { ...ONE_STREAM, streams: 0 };
  const ONE_HELD_UP = { ...ONE_WAITING, subscribers: 0 };

  it.each([
    ['in the middle of a POST stream', stream],
    [
      'in the middle of a GET stream',
      async () => {
        const starter = stream('silent');
        await starter.read(2);
        starter.reset();
        return follow(starter.executionId);
      },
    ],
  ])('%s', async (_name, open) => {
    const client = await open('silent');
    await client.read(2);
    await untilOpen(ONE_STREAM);
    client.reset();
    await untilOpen(NOTHING);
  });

  it('in the middle of a stream that it does not read', async () => {
    const client = stream('flood');
    await client.read(1);
    client.stall();
    await untilOpen(ONE_STREAM);
    await untilHeld({ responses: 1, readers: 1 });
    client.reset();
    await untilOpen(NOTHING);
  });

  it('waiting for the answer of POST execute', async () => {
    const client = execute('silent');
    await untilOpen(ONE_WAITING);
    client.reset();
    await untilOpen(NOTHING);
  });

  it('waiting for two answers, one behind the other on its connection', async () => {
    const { hostname, port } = new URL(server.url);
    const body = JSON.stringify(request('silent'));
    const head = `POST /api/workflows/execute HTTP/1.1\r\nHost: ${hostname}\r\nContent-Type: application/json\r\n`;
    const post = `${head}Content-Length: ${body.length}\r\n\r\n${body}`;
    const client = connect({ host: hostname, port: Number(port) });
    client.write(post + post);
    await untilOpen({ ...ONE_WAITING, subscribers: 2 });
    client.resetAndDestroy();
    await untilOpen(NOTHING);
  });

  it.each([
    ['its POST stream', stream],
    ['its POST execute', execute],
  ])('before the first byte, while the database holds up %s', async (_name, open) => {
    const earlier = upstream.requests.length;
    await database.whileLocked('execution', 'SHARE', async () => {
      const client = open('mute');
      await untilHeldUp(1, INSERT);
      await untilOpen(ONE_HELD_UP);
      client.reset();
      await untilOpen(NOTHING);
    });
    await upstream.request(earlier); // it was accepted, and runs without its client
    await untilOpen(NOTHING);
  });

  it('before the first byte, while the database holds up its GET stream', async () => {
    const starter = stream('silent');
    await starter.read(2);
    starter.reset();
    await database.whileLocked('execution_chunk', 'ACCESS EXCLUSIVE', async () => {
      const client = follow(starter.executionId);
      await untilHeldUp(1, 'stored_sequence');
      client.reset();
      await untilOpen(NOTHING);
    });
    await untilOpen(NOTHING);
  });

  it('and none of them is in memory any more', () => untilHeld(NOTHING_HELD));
});

/** Resolves when this many statements wait for a lock of {@link TestDatabase.whileLocked}. */
async function untilHeldUp(count: number, statement: string): Promise<void> {
  await until(async () => {
    const rows = await database.query(
      `SELECT 1 FROM pg_stat_activity
        WHERE datname = current_database() AND wait_event_type = 'Lock' AND strpos(query, $1) > 0`,
      [statement],
    );
    return rows.length === count || undefined;
  });
}

/** What a server has open in all, and its PostgreSQL with it. */
async function openInAll(of: ServerProcess) {
  const sessions = await database.query<{ state: string | null }>(
    'SELECT state FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()',
  );
  return {
    descriptors: await of.openDescriptors(),
    sockets: await of.metric('nodejs_active_handles', '{type="Socket"}'),
    timers: await of.metric('nodejs_active_resources', '{type="Timeout"}'),
    databaseConnections: sessions.length,
    transactions: sessions.filter(({ state }) => state?.includes('transaction')).length,
  };
}

it('hundreds of clients that reset their connections leave nothing open, though nothing happens after that', async () => {
  // The process with the clients runs nothing, so that what it has open afterwards was left by them.
  const worker = await startServer({ ROLE: 'worker', WORKER_CONCURRENCY: '2000', JOB_LOCK_MS: '60000' });
  const api = await startServer({ ROLE: 'api', DATABASE_POOL_SIZE: String(HALF_WAVE + OWN_TRAFFIC) });
  const read = { inTheMiddle: 0, nothing: 0 };
  const wave = async () => {
    const middle = Array.from({ length: HALF_WAVE }, () => stream('silent', api));
    await Promise.all(middle.map((client) => client.read(2)));
    await database.whileLocked('execution', 'SHARE', async () => {
      const beginning = Array.from({ length: HALF_WAVE }, () => stream('mute', api));
      await untilHeldUp(HALF_WAVE, INSERT);
      read.inTheMiddle += middle.filter((client) => client.frames === 2 && !client.isOver).length;
      read.nothing += beginning.filter((client) => client.bytesRead === 0 && !client.isOver).length;
      for (const client of [...middle, ...beginning]) client.reset();
    });
  };
  try {
    const earlier = upstream.requests.length;
    await wave(); // so that the pools have the size that a wave takes
    await untilOpen(NOTHING, api);
    const before = await openInAll(api);
    for (let count = 0; count < WAVES; count++) await wave();
    const started = (WAVES + 1) * HALF_WAVE;
    expect(read).toEqual({ inTheMiddle: started, nothing: started });
    await untilPasses(async () => {
      expect(await openFor(api)).toEqual(NOTHING);
      const after = await openInAll(api);
      expect(after.transactions).toBe(0);
      expect(after.descriptors).toBeLessThan(before.descriptors + OWN_TRAFFIC);
      expect(after.sockets).toBeLessThan(before.sockets + OWN_TRAFFIC);
      expect(after.timers).toBeLessThan(before.timers + OWN_TRAFFIC);
      expect(after.databaseConnections).toBeLessThan(before.databaseConnections + OWN_TRAFFIC);
    }, FREED_MS);
    await untilHeld(NOTHING_HELD, api);

    // They have harmed no run either: each one goes on without its client.
    await until(() => upstream.requests.length - earlier === 2 * started || undefined);
    for (const response of silent) {
      writeStream(response, chatEnd());
      response.end();
    }
    await until(async () => {
      const running = await database.query(`SELECT 1 FROM execution WHERE status <> 'completed'`);
      return running.length === 0 || undefined;
    });
  } finally {
    await Promise.all([worker, api].map((process) => process.stop('SIGKILL')));
  }
}, 180_000);

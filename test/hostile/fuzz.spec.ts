import { describe, expect, it } from '@jest/globals';
import { ERROR_CODES } from '../../src/errors.js';
import type { ErrorCode } from '../../src/errors.js';
import { expectUnharmed, withBystander } from '../support/bystander.js';
import { rounds } from '../support/effort.js';
import { Random } from '../support/random.js';
import { Studio, echo } from '../support/studio.js';
import type { ServerProcess } from '../support/studio-process.js';
import { withProcesses } from '../support/with-processes.js';
import { WsClient } from '../support/ws-client.js';
import { fuzzedRequest } from './fuzzed-requests.js';
import type { FuzzedRequest, Known } from './fuzzed-requests.js';
import { hostileValue, mutate } from './hostile-values.js';
import { MESSAGES, sample } from './interface.js';
import { exchange } from './raw-exchange.js';
import type { Exchange } from './raw-exchange.js';

/** `FUZZ_SEED` repeats the requests of a failure. */
const SEED = Number(process.env.FUZZ_SEED ?? Math.floor(Math.random() * 2 ** 31));
const REQUESTS = rounds(2500, 20);
const MESSAGES_SENT = 1000;
const AT_ONCE = 16;
/** After so many requests what they are about is made anew: some of them delete it. */
const RENEWED_AFTER = 100;
/** A request that is neither answered nor closed after so long hangs, ms: no limit of the server below is as long. */
const BOUND_MS = 30_000;

const system = withProcesses({
  env: { REQUEST_TIMEOUT_MS: '500', KEEP_ALIVE_TIMEOUT_MS: '200', EXECUTION_TIMEOUT_S: '10' },
});

async function makeKnown(studio: Studio): Promise<Known> {
  const deployment_name = await studio.deploy(echo());
  const post = async (path: string, body: unknown) =>
    (await studio.json<Record<string, string>>(path, { method: 'POST', body })).body;
  const workflow = await post('/api/workflows', { name: 'fuzzed', configuration: echo() });
  const execution = await post('/api/workflows/execute', { deployment_name, query: 'x' });
  const batch = await post('/api/workflows/execute/batch', { deployment_name, items: [{ query: 'x' }] });
  const names = {
    workflow_id: String(workflow['workflow_id']),
    deployment_name,
    execution_id: String(execution['execution_id']),
    batch_id: String(batch['batch_id']),
  };
  return { names, ids: Object.values(names) };
}

/** What is wrong with an answer, if anything. */
function faultOf(answer: Exchange, method: string): string | undefined {
  const { status, contentType, body, end } = answer;
  if (end === 'hanging') return 'it is neither answered nor closed';
  if (status < 400 || method === 'HEAD') return status === 500 ? '500' : undefined;
  if (!contentType.startsWith('application/problem+json')) return `no problem document: ${contentType}`;
  let code: ErrorCode;
  try {
    code = (JSON.parse(body) as { code: ErrorCode }).code;
  } catch {
    return `no JSON: ${body.slice(0, 200)}`;
  }
  if (code === 'internal_error') return 'a defect';
  return ERROR_CODES[code]?.status === status ? undefined : `the code ${code} with the status ${status}`;
}

/** All requests. Those that know of the same are made together, so that they do not depend on who is answered first. */
async function* requestsTo(server: ServerProcess): AsyncGenerator<FuzzedRequest, void, void> {
  const random = new Random(SEED);
  const studio = new Studio(server.url);
  for (let made = 0; made < REQUESTS && server.lives; made += RENEWED_AFTER) {
    const known = await makeKnown(studio);
    yield* Array.from({ length: Math.min(RENEWED_AFTER, REQUESTS) }, () => fuzzedRequest(random, known));
  }
}

/** Sends all requests, some at once. @returns what was wrong, with each request */
async function fuzzHttp(server: ServerProcess): Promise<string[]> {
  const faults: string[] = [];
  const requests = requestsTo(server);
  const sendAll = async () => {
    for await (const { bytes, half, method } of requests) {
      const fault = faultOf(await exchange(server.url, bytes, { boundMs: BOUND_MS, half }), method);
      if (fault) faults.push(`${fault}: ${JSON.stringify(bytes.toString('latin1').slice(0, 600))}`);
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, sendAll));
  return faults;
}

/** Sends messages over WebSockets, and a good one after each few. @returns what was wrong */
async function fuzzWebSocket(server: ServerProcess): Promise<string[]> {
  const random = new Random(SEED);
  const known = await makeKnown(new Studio(server.url));
  const faults: string[] = [];
  let client = await WsClient.open(server.url);
  for (let sent = 0; sent < MESSAGES_SENT; sent++) {
    const text = fuzzedMessage(random, known);
    if (client.closed) client = await WsClient.open(server.url);
    client.sendText(text);
    if (sent % 5 > 0) continue;
    // Everything before it is answered or refused by then; text that is no JSON closes the socket.
    const id = client.send('ping');
    const answered = await Promise.race([
      client
        .answer((answer) => answer.id === id)
        .then(
          () => true,
          () => true,
        ),
      new Promise<boolean>((resolve) => setTimeout(resolve, BOUND_MS, false).unref()),
    ]);
    if (!answered) faults.push(`no answer after ${text.slice(0, 600)}`);
    const defects = client.answers.filter(({ data }) => data?.['code'] === 'internal_error');
    if (defects.length > 0) faults.push(`a defect: ${defects[0]?.raw} after ${text.slice(0, 600)}`);
    if (defects.length > 0 || client.answers.length > 2000) await client.close();
  }
  client.reset();
  return faults;
}

function fuzzedMessage(random: Random, { names }: Known): string {
  const { event, data } = random.pick(MESSAGES);
  let message: unknown = { event, id: random.int(0, 10), data: sample(data, names) };
  for (let times = random.int(0, 3); times > 0; times--) message = mutate(message, random);
  const choice = random.next();
  if (choice < 0.03) return random.pick(['', '{', 'x', '\0', '[', '{"event":']);
  if (choice < 0.06) return JSON.stringify(hostileValue(random)) ?? '1';
  return JSON.stringify(message) ?? 'null';
}

describe(`what nobody sends in earnest harms nobody (FUZZ_SEED=${SEED})`, () => {
  it.each(
    (
      [
        [`${REQUESTS} requests of all routes`, fuzzHttp],
        [`${MESSAGES_SENT} messages on WebSockets`, fuzzWebSocket],
      ] as const
    ).slice(0, rounds(2, 1)),
  )(
    '%s',
    async (_, fuzz) => {
      const server = await system.start();
      const witness = await withBystander(server, () => fuzz(server));
      expect(witness.outcome).toEqual([]);
      expect(await server.pollution()).toEqual([]);
      expectUnharmed(witness);
      await server.stop('SIGKILL');
    },
    600_000,
  );
});

import { randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { answerOf } from '../support/call-ledger.js';
import { Chaos, START_MS } from '../support/chaos.js';
import { expectWhole } from '../support/chaos-checks.js';
import { each } from '../support/each.js';
import { rounds } from '../support/effort.js';
import { expectByChance } from '../support/inconclusive.js';
import { NGINX } from '../support/nginx.js';
import { Studio, faultsOfStream, textOf, until } from '../support/studio.js';
import type { EventStream, Frame } from '../support/studio.js';
import { Yardstick } from '../support/yardstick.js';

const STREAMS = rounds(120, 60);
const AT_ONCE = 8;
const CHUNKS = 200;
const SAME = 100;
/** How soon a cancelled execution's model has lost its connection. */
const CUT_OFF_MS = 1000;

let chaos: Chaos;

beforeAll(async () => {
  chaos = await Chaos.start({ nginx: true });
}, START_MS);
afterAll(() => chaos?.stop(), START_MS);

const one = (pieces: number, pauseMs: number) => ({ agents: [chaos.ledger.agent('a', pieces, pauseMs)] });
const api = (index: number) => chaos.studio(index);
const throughNginx = () => new Studio(chaos.stack.url);
const anywhere = () => new Studio(chaos.random.pick([...chaos.apiUrls, chaos.stack.url]));

/** The events of a stream as they came, without the `retry` that each connection begins with. */
const eventsOf = ({ raw }: EventStream) => raw.replace(/^retry: \d+\n/m, '').split(/(?<=\n\n)/);

const range = (count: number) => Array.from({ length: count }, (_, index) => index);

async function cancel(id: string, index: number): Promise<number> {
  return (await api(index).json(`/api/executions/${id}/cancel`, { method: 'POST' })).status;
}

const rowOf = async (id: string) => (await chaos.rows([id]))[0];

const withNginx = NGINX || process.env.CI ? describe : describe.skip;

withNginx(`through nginx and several processes${NGINX ? '' : ': nginx is not installed'}`, () => {
  it(`each of ${STREAMS} streams begins with its first chunk, and is whole`, async () => {
    await chaos.reporting(async () => {
      const deployment = await api(0).deploy(one(3, 0));
      const faults: string[] = [];
      let whole = 0;
      await each(range(STREAMS), AT_ONCE, async () => {
        const query = chaos.marker();
        const stream = await anywhere().stream({ deployment_name: deployment, query });
        const frames = await stream.frames();
        faults.push(...faultsOfStream(frames, stream.executionId));
        if (textOf(frames) === answerOf(query, 'a', 3)) whole++;
      });
      expect(faults).toEqual([]);
      expect(whole).toBe(STREAMS);
    });
  }, 120_000);

  it('a stream goes on from every cut point at another process, byte for byte', async () => {
    await chaos.reporting(async () => {
      const deployment = await api(0).deploy(one(CHUNKS - 2, 0));
      const stream = await api(0).stream({ deployment_name: deployment, query: chaos.marker() });
      const frames = await stream.frames();
      const id = stream.executionId;
      expect(faultsOfStream(frames, id)).toEqual([]);
      expect(frames).toHaveLength(CHUNKS);
      const events = eventsOf(stream);
      let resumed = 0;
      await each(range(CHUNKS - 1), AT_ONCE, async (index) => {
        const rest = await (index % 4 === 0 ? throughNginx() : api(1)).follow(id, index + 1);
        await rest.frames();
        expect([...events.slice(0, index + 1), ...eventsOf(rest)]).toEqual(events);
        resumed++;
      });
      expect(resumed).toBe(CHUNKS - 1);
      expect((await api(1).follow(id, CHUNKS)).status).toBe(204);
    });
  }, 120_000);

  it('four of five readers leave at some moment, and the fifth has everything', async () => {
    await chaos.reporting(async () => {
      const deployment = await api(0).deploy(one(60, 5));
      for (let round = 0; round < rounds(5, 2); round++) {
        const first = await anywhere().stream({ deployment_name: deployment, query: chaos.marker() });
        const id = first.executionId;
        const faithful = (await api(round % 2).follow(id)).frames();
        const leaving = [
          first,
          await api(0).follow(id),
          await api(1).follow(id),
          await throughNginx().follow(id),
        ];
        const heads = await Promise.all(leaving.map((stream) => stream.take(chaos.random.int(1, 50))));
        const lines = (await faithful).map(({ data }) => data);
        expect(faultsOfStream(await faithful, id)).toEqual([]);
        for (const head of heads) {
          expect(head.length).toBeGreaterThanOrEqual(1);
          expect(head.map(({ data }) => data)).toEqual(lines.slice(0, head.length));
        }
        expect(await rowOf(id)).toMatchObject({ status: 'completed', attempt: 1 });
      }
    });
  }, 120_000);

  it('a hundred executions of one deployment at once stay apart', async () => {
    await chaos.reporting(async () => {
      const deployment = await api(0).deploy(one(20, 10));
      const urls = [...chaos.apiUrls, chaos.stack.url];
      const clients = range(100).map(() => chaos.client(deployment, chaos.marker('apart'), urls).stream());
      const runs = await Promise.all(clients);
      for (const { marker, frames } of runs) {
        const mentioned = JSON.stringify(frames).match(/<<apart-\d+>>/g);
        expect(new Set(mentioned)).toEqual(new Set([marker]));
      }
      await expectWhole(chaos, runs, { speakers: () => [{ agent_id: 'a', pieces: 20 }] });
    });
  }, 120_000);

  it('a hundred equal requests with one Idempotency-Key make one execution, and one model call', async () => {
    await chaos.reporting(async () => {
      const deployment = await api(0).deploy(one(20, 10));
      const query = chaos.marker('same');
      const body = { deployment_name: deployment, query };
      const headers = { 'Idempotency-Key': randomUUID() };
      const asked = range(SAME).map(async (index) => {
        if (index % 2 === 0) {
          const stream = await anywhere().stream(body, { headers });
          expect(faultsOfStream(await stream.frames(), stream.executionId)).toEqual([]);
          return stream.executionId;
        }
        const path = `/api/workflows/execute${index % 4 === 1 ? '/async' : ''}`;
        const answer = await anywhere().json<{ execution_id: string }>(path, {
          method: 'POST',
          body,
          headers,
        });
        expect([200, 202]).toContain(answer.status);
        return answer.body.execution_id;
      });
      const ids = await Promise.all(asked);
      expect(ids).toHaveLength(SAME);
      expect(new Set(ids).size).toBe(1);
      expect(chaos.ledger.of(query)).toHaveLength(1);
      const rows = await chaos.sql("SELECT 1 FROM execution WHERE input->>'query' = $1", [query]);
      expect(rows).toHaveLength(1);
    });
  }, 120_000);
});

withNginx('a cancellation at a process that has nothing to do with the execution', () => {
  it('closes the connection of the model within a second, and keeps the text so far', async () => {
    await chaos.reporting(async () => {
      const deployment = await api(0).deploy(one(20, 5));
      for (let round = 0; round < rounds(5, 3); round++) {
        const yardstick = await Yardstick.lay(chaos.stack.databaseUrl);
        const marker = chaos.marker('cancelled');
        chaos.ledger.hold(marker);
        const stream = await api(0).stream({ deployment_name: deployment, query: marker });
        const waiting = stream.frames();
        const call = await chaos.ledger.call(marker);
        await until(async () => (await chaos.lastSequence(marker)) === 11);
        expect(await cancel(stream.executionId, 1)).toBe(202);
        const answeredAt = Date.now();
        expect(await call.closed).toBe(true);
        await yardstick.expectAtMost(Date.now() - answeredAt, CUT_OFF_MS, 'cutting off the model');
        const frames = await waiting;
        expect(faultsOfStream(frames, stream.executionId)).toEqual([]);
        expect(frames.at(-1)?.chunk.status).toBe('cancelled');
        const response = answerOf(marker, 'a', 10);
        expect(await rowOf(stream.executionId)).toMatchObject({ status: 'cancelled', response });
      }
    });
  }, 120_000);

  it('lets no step begin after its answer', async () => {
    await chaos.reporting(async () => {
      const ids = range(30).map((index) => `s${index}`);
      const agents = ids.map((id) => chaos.ledger.agent(id, 2, 5));
      const connections = ids
        .slice(1)
        .map((id, index) => ({ source_agent_id: ids[index], target_agent_id: id }));
      const deployment = await api(0).deploy({ agents, connections });
      for (let round = 0; round < rounds(5, 3); round++) {
        const marker = chaos.marker('chain');
        const stream = await api(0).stream({ deployment_name: deployment, query: marker });
        const calls = chaos.random.int(1, 11);
        await until(() => chaos.ledger.of(marker).length >= calls);
        expect(await cancel(stream.executionId, 1)).toBe(202);
        const begun = chaos.ledger.of(marker).length;
        const frames = await stream.frames();
        expect(frames.at(-1)?.chunk.status).toBe('cancelled');
        await Promise.all(chaos.ledger.of(marker).map(({ closed }) => closed));
        expect(begun).toBeLessThan(ids.length);
        expect(chaos.ledger.of(marker)).toHaveLength(begun);
      }
    });
  }, 120_000);

  it('before the start ends the execution without a step', async () => {
    await chaos.reporting(async () => {
      const { workers } = chaos.stack;
      const deployment = await api(0).deploy(one(2, 0));
      workers.forEach((worker) => worker.kill('SIGSTOP'));
      const markers = range(10).map(() => chaos.marker('early'));
      const streams: EventStream[] = [];
      for (const query of markers) streams.push(await api(0).stream({ deployment_name: deployment, query }));
      const answers = await Promise.all(streams.map(({ executionId }) => cancel(executionId, 1)));
      workers.forEach((worker) => worker.kill('SIGCONT'));
      expect(new Set(answers)).toEqual(new Set([202]));
      for (const stream of streams) {
        const statuses = (await stream.frames()).map(({ chunk }) => chunk.status);
        expect(statuses).toEqual(['started', 'cancelled']);
      }
      await chaos.client(deployment).stream(); // the workers have been through the queue
      expect(markers.flatMap((marker) => chaos.ledger.of(marker))).toEqual([]);
    });
  }, 120_000);

  it('that races the end is either kept or refused', async () => {
    await chaos.reporting(async () => {
      const deployment = await api(0).deploy(one(1, 0));
      const outcomes = { 202: 0, 409: 0 };
      // Later after each run that was slower, earlier after each that was faster, so that both keep happening.
      let delay = 10;
      for (let round = 0; round < rounds(40, 20); round++) {
        const stream = await api(0).stream({ deployment_name: deployment, query: chaos.marker('race') });
        const id = stream.executionId;
        if (delay > 0) await sleep(delay);
        const status = await cancel(id, 1);
        if (status !== 202 && status !== 409)
          throw new Error(`The cancellation was answered with ${status}.`);
        outcomes[status]++;
        delay = Math.max(0, delay + (status === 202 ? 2 : -2));
        const frames: Frame[] = await stream.frames();
        const end = status === 202 ? 'cancelled' : 'completed';
        expect([faultsOfStream(frames, id), frames.at(-1)?.chunk.status]).toEqual([[], end]);
        expect((await rowOf(id))?.status).toBe(end);
      }
      expectByChance('cancellations that were kept', outcomes[202], rounds(5, 2));
      expectByChance('cancellations that came too late', outcomes[409], rounds(5, 2));
    });
  }, 120_000);
});

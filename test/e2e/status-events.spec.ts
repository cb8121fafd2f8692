import { describe, expect, it } from '@jest/globals';
import { Client } from 'pg';
import { LOCKS } from '../../src/database/locks.js';
import { StatusEvents } from '../../src/status-events/status-events.js';
import type { StatusChange, StatusSnapshot } from '../../src/status-events/status-event.js';
import { itInFull, rounds } from '../support/effort.js';
import { StatusWatcher } from '../support/status-watcher.js';
import { echo, until, upstreamAgent } from '../support/studio.js';
import { chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import { withStudio } from '../support/with-studio.js';

let release: () => void = () => undefined;
const released = new Promise<void>((resolve) => (release = resolve));
const server = withStudio({
  upstream: async (response) => {
    writeStream(response, chatDelta('x'));
    await released;
    response.end(chatEnd());
  },
  others: { api: { ROLE: 'api' } },
});
const { studio, upstream } = server;
const { api } = server.others;

const watch = (path: string, lastEventId?: string) => StatusWatcher.open(path, [server.url], lastEventId);
const ALL = '/api/executions/events';
const run = (deployment_name: string) =>
  studio.execute<{ execution_id: string }>({ deployment_name, query: 'x' });

describe('who watches', () => {
  it('gets a snapshot, and then every change of status once, in order', async () => {
    const held = await studio.deploy(upstreamAgent());
    const quick = await studio.deploy(echo());
    const before = await studio.stream({ deployment_name: held, query: 'x' });
    await until(() => (upstream.requests.length > 0 ? true : undefined));
    const watcher = await watch(ALL);
    const snapshot = (await until(() => watcher.messages[0])) as StatusSnapshot;
    expect(snapshot).toMatchObject({ type: 'snapshot', queued: 0, running: 1 });
    expect(snapshot).not.toHaveProperty('deployments');
    const moment = expect.stringMatching(/^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/);
    expect(snapshot.executions).toEqual([
      {
        execution_id: before.executionId,
        deployment_id: expect.any(String),
        deployment_name: held,
        environment: 'production',
        workflow_id: expect.any(String),
        status: 'running',
        attempts: 1,
        created_at: moment,
        started_at: moment,
      },
    ]);
    const { body } = await run(quick);
    release();
    await before.frames();
    const failing = await studio.deploy({
      agents: [
        {
          agent_id: 'a',
          agent_type: 'template',
          config: { template: '{% for i in (1..9999999) %}{{ i }}{% endfor %}' },
        },
      ],
    });
    const failed = await studio.stream({ deployment_name: failing, query: 'x' });
    await failed.frames();
    await until(() => watcher.changes().length >= 7 || undefined);
    const told = (id: string) =>
      watcher.changes().flatMap((change) => (change.execution_id === id ? [change.status] : []));
    expect(told(body.execution_id)).toEqual(['queued', 'running', 'completed']);
    expect(told(before.executionId)).toEqual(['completed']);
    expect(told(failed.executionId)).toEqual(['queued', 'running', 'error']);
    expect(watcher.changes().find(({ status }) => status === 'error')).toEqual({
      type: 'execution',
      execution_id: failed.executionId,
      status: 'error',
      attempts: 1,
      code: expect.any(String),
      deployment_id: expect.any(String),
      deployment_name: failing,
      environment: 'production',
      workflow_id: expect.any(String),
      sequence: expect.any(Number),
      timestamp: moment,
    });
    expect(watcher.raw.match(/^retry: /gm)).toHaveLength(1);
    watcher.leave();
  });

  it('misses and repeats nothing under load, whenever it begins, at whichever process, and however often it is cut off', async () => {
    const deployment = await studio.deploy(echo());
    const path = `${ALL}?deployment_name=${deployment}`;
    const runs = rounds(80, 30);
    let begun = 0;
    let ended = false;
    const watchers: { watcher: StatusWatcher; reading: Promise<void> }[] = [];
    const beginToWatch = () => {
      const watcher = new StatusWatcher(path, [server.url, api.url]);
      const isDone = () => ended && watcher.changes().some((change) => change.sequence >= lastSequence);
      watchers.push({ watcher, reading: watcher.readInPieces(isDone) });
    };
    let lastSequence = Infinity;
    const ids: string[] = [];
    const client = async () => {
      while (begun < runs) {
        const index = begun++;
        // Whoever begins when all is over has nothing to wait for.
        if (index % rounds(8, 6) === 0 && index < runs - 14) beginToWatch();
        ids.push((await run(deployment)).body.execution_id);
      }
    };
    await Promise.all(Array.from({ length: 8 }, client));
    // One more, whose end is the last change: whoever has it has all.
    const last = (await run(deployment)).body.execution_id;
    ids.push(last);
    ended = true;
    lastSequence = await until(async () => {
      const rows = await server.database.query<{ sequence: string | null }>(
        "SELECT sequence FROM status_event WHERE execution_id = $1 AND status = 'completed'",
        [last],
      );
      return rows[0]?.sequence ? Number(rows[0].sequence) : undefined;
    });
    await Promise.all(watchers.map(({ reading }) => reading));
    expect(watchers.length).toBeGreaterThanOrEqual(rounds(8, 3));
    for (const { watcher } of watchers) {
      const [snapshot, ...changes] = watcher.messages as [StatusSnapshot, ...StatusChange[]];
      expect(snapshot.type).toBe('snapshot');
      expect(changes.every(({ type }) => type === 'execution')).toBe(true);
      const sequences = watcher.messages.map(({ sequence }) => sequence);
      expect(sequences).toEqual([...new Set(sequences)].toSorted((one, other) => one - other));
      const statuses = new Map<string, string[]>(ids.map((id) => [id, []]));
      for (const { execution_id, status } of snapshot.executions) statuses.get(execution_id)?.push(status);
      for (const { execution_id = '', status } of changes) statuses.get(execution_id)?.push(status);
      const whole = ['queued', 'running', 'completed'];
      const possible = [[], whole, whole.slice(1)].map((list) => list.join());
      for (const list of statuses.values()) expect(possible).toContain(list.join());
      expect(statuses.get(last)).toEqual(whole);
    }
  });

  it('gets what it missed when it comes back, and a snapshot when that is not kept any more', async () => {
    const deployment = await studio.deploy(echo());
    const path = `${ALL}?deployment_name=${deployment}`;
    const first = await watch(path);
    await until(() => first.messages[0]);
    await run(deployment);
    await until(() => first.changes().length === 3 || undefined);
    first.leave();
    await run(deployment);
    const again = await watch(path, first.ids[1]);
    await until(() => again.messages.length === 5 || undefined);
    expect(again.messages.slice(0, 2)).toEqual(first.messages.slice(2));
    expect(again.changes().map(({ status }) => status)).toEqual([
      'running',
      'completed',
      'queued',
      'running',
      'completed',
    ]);
    again.leave();
    const byQuery = await watch(`${path}&after=${first.ids[1]}`);
    await until(() => byQuery.messages.length === 5 || undefined);
    expect(byQuery.messages).toEqual(again.messages);
    byQuery.leave();

    await server.database.query('DELETE FROM status_event WHERE sequence <= $1', [Number(first.ids[2])]);
    for (const id of [first.ids[1], '999999999999999']) {
      const late = await watch(path, id);
      expect(await until(() => late.messages[0])).toMatchObject({ type: 'snapshot' });
      late.leave();
    }
  });

  it('gets only what passes the filter', async () => {
    const [one, other] = [await studio.deploy(echo()), await studio.deploy(echo())];
    const ended = await watch(`${ALL}?deployment_name=${one}&status=completed,error`);
    const nowhere = await watch(`${ALL}?environment=nowhere`);
    await until(() => (ended.messages.length && nowhere.messages.length) || undefined);
    await run(other);
    await run(one);
    await run(one);
    await until(() => ended.changes().length === 2 || undefined);
    expect(ended.changes()).toMatchObject([
      { status: 'completed', deployment_name: one },
      { status: 'completed', deployment_name: one },
    ]);
    expect(nowhere.messages).toHaveLength(1);
    const { workflow_id } = (await studio.json<{ workflow_id: string }>(`/api/deployments/${other}`)).body;
    const ofWorkflow = await watch(`${ALL}?workflow_id=${workflow_id}&after=0`);
    await until(() => ofWorkflow.changes().length === 3 || undefined);
    expect(new Set(ofWorkflow.changes().map(({ deployment_name }) => deployment_name))).toEqual(
      new Set([other]),
    );
    for (const watcher of [ended, nowhere, ofWorkflow]) watcher.leave();
  });

  it('is told of changes though more of them keep coming', async () => {
    const deployment = await studio.deploy(echo());
    const { body } = await run(deployment);
    const watcher = await watch(`${ALL}?deployment_name=busy`);
    await until(() => watcher.messages[0]);
    let heard = false;
    let commits = 0;
    const commitAgainAndAgain = async () => {
      const client = new Client(server.database.url);
      await client.connect();
      while (!heard) {
        await client.query(
          `INSERT INTO status_event (deployment_id, deployment_name, environment, workflow_id, execution_id, status, created_at)
           SELECT deployment_id, 'busy', environment, workflow_id, execution_id, status, now() FROM execution WHERE execution_id = $1`,
          [body.execution_id],
        );
        commits++;
      }
      await client.end();
    };
    const committing = Array.from({ length: 6 }, commitAgainAndAgain);
    try {
      await until(() => watcher.changes().length > 100 || undefined);
    } finally {
      heard = true;
      await Promise.all(committing);
      watcher.leave();
    }
    // It need not wait until there is a pause.
    expect(commits).toBeLessThan(10_000);
  });

  itInFull(
    'is sent away for a moment, and nobody else is harmed, while a stopped process holds the numbering',
    async () => {
      const deployment = await studio.deploy(echo());
      const stopped = new Client(server.database.url);
      await stopped.connect();
      try {
        await stopped.query('SELECT pg_advisory_lock(7061923419)');
        const [refused, ran] = await Promise.all([fetch(server.url + ALL), run(deployment)]);
        expect(refused.status).toBe(503);
        expect(Number(refused.headers.get('retry-after'))).toBeGreaterThan(0);
        expect(ran.status).toBe(200);
      } finally {
        await stopped.end();
      }
      const watcher = await watch(ALL);
      expect(await until(() => watcher.messages[0])).toMatchObject({ type: 'snapshot' });
      watcher.leave();
    },
  );

  it('is served, and no other execution waits, while very many changes are not numbered yet', async () => {
    const deployment = await studio.deploy(echo());
    await server.database.query(
      `INSERT INTO status_event (deployment_id, deployment_name, environment, workflow_id, status, created_at)
       SELECT deployment_id, deployment_name, environment, workflow_id, 'inactive', now()
         FROM deployment, generate_series(1, $2::int) WHERE deployment_name = $1`,
      [deployment, rounds(100_000, 35_000)],
    );
    const [watchers, ran] = await Promise.all([
      Promise.all([watch(ALL), watch(ALL), watch(`${ALL}?status=queued`)]),
      run(deployment),
    ]);
    expect(ran.status).toBe(200);
    for (const watcher of watchers)
      expect(await until(() => watcher.messages[0])).toMatchObject({ type: 'snapshot' });
    const { executionId } = await studio.stream({ deployment_name: deployment, query: 'x' });
    // The snapshot has all that was pending, so this is what comes after it.
    const [watcher] = watchers;
    await until(
      () =>
        watcher?.changes().filter(({ execution_id }) => execution_id === executionId).length === 3 ||
        undefined,
    );
    watchers.forEach((each) => each.leave());
  });

  it('is told when it asks for what can not be', async () => {
    for (const query of [
      'status=done',
      'after=-1',
      'after=x',
      'workflow_id=7',
      'colour=red',
      'environment=%00',
    ]) {
      const answer = await studio.json(`${ALL}?${query}`);
      expect([query, answer.status, (answer.body as { code: string }).code]).toEqual([
        query,
        400,
        'validation_failed',
      ]);
    }
    for (const id of ['x', '1.5', '-1', '01a20603-0fb3-76ca-a02d-e1eb4f6f48c9:3', '9'.repeat(30)]) {
      const answer = await studio.json(ALL, { headers: { 'Last-Event-ID': id } });
      expect(answer).toMatchObject({ status: 400, body: { code: 'invalid_cursor' } });
    }
    const unknown = await studio.json('/api/deployments/nobody/events');
    expect(unknown).toMatchObject({ status: 404, body: { code: 'deployment_not_found' } });
  });
});

describe('who watches a deployment', () => {
  it('sees it stop, come back and go, and its executions', async () => {
    const name = await studio.deploy(echo());
    await studio.execute({ deployment_name: name, query: 'x' });
    const watcher = await watch(`/api/deployments/${name}/events`);
    const snapshot = (await until(() => watcher.messages[0])) as StatusSnapshot;
    expect(snapshot).toMatchObject({ queued: 0, running: 0, executions: [] });
    expect(snapshot.deployments).toMatchObject([
      { deployment_name: name, status: 'active', execution_count: 1, success_count: 1 },
    ]);
    const { workflow_id } = (await studio.json<{ workflow_id: string }>(`/api/deployments/${name}`)).body;
    await run(name);
    await studio.json(`/api/workflows/deployments/${name}/stop`, { method: 'POST' });
    await studio.json(`/api/workflows/deployments/${name}/stop`, { method: 'POST' });
    await studio.json(`/api/workflows/${workflow_id}/deploy`, {
      method: 'POST',
      body: { deployment_name: name },
    });
    await studio.json(`/api/workflows/deployments/${name}`, { method: 'DELETE' });
    await until(() => watcher.changes().length === 6 || undefined);
    expect(watcher.changes().map(({ type, status }) => `${type} ${status}`)).toEqual([
      'execution queued',
      'execution running',
      'execution completed',
      'deployment inactive',
      'deployment active',
      'deployment deleted',
    ]);
    watcher.leave();
  });
});

it('the streams end in good order when the server shuts down', async () => {
  const second = await server.startAnother({ ROLE: 'api' });
  const watcher = new StatusWatcher(ALL, [second.url]);
  await watcher.connect();
  await until(() => watcher.messages[0]);
  await second.close();
  await until(() => watcher.ended || undefined);
});

it('different snapshots that wait are bounded; the same one is made once', async () => {
  const events = server.app.get(StatusEvents);
  const client = new Client({ connectionString: server.database.url });
  await client.connect();
  await client.query('SELECT pg_advisory_lock($1)', [LOCKS.sequence]);
  const others = Array.from({ length: 199 }, (_, index) => ({ deployment_name: `none-${index}` }));
  const same = [
    { status: ['queued' as const, 'running' as const] },
    { status: ['running' as const, 'queued' as const, 'running' as const] },
  ];
  const asked = [...others, ...same].map((filter) => events.begin(filter, undefined));
  await expect(events.begin({ deployment_name: 'one-more' }, undefined)).rejects.toMatchObject({
    code: 'too_many_requests',
  });
  await client.query('SELECT pg_advisory_unlock($1)', [LOCKS.sequence]);
  await client.end();
  const snapshots = await Promise.all(asked);
  expect(snapshots.at(-1)).toBe(snapshots.at(-2));
});

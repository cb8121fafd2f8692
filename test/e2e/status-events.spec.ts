import { randomInt } from 'node:crypto';
import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { createParser } from 'eventsource-parser';
import type { StatusChange, StatusSnapshot } from '../../src/status-events/status-event.js';
import { startTestApp } from '../support/app.js';
import type { TestApp } from '../support/app.js';
import { Studio, echo, until, upstreamAgent } from '../support/studio.js';
import { Upstream, chatDelta, chatEnd, writeStream } from '../support/upstream.js';

type StatusMessage = StatusChange | StatusSnapshot;

let upstream: Upstream;
let release: () => void;
let server: TestApp;
let api: TestApp;
let studio: Studio;

beforeAll(async () => {
  const released = new Promise<void>((resolve) => (release = resolve));
  upstream = await Upstream.start(async (response) => {
    writeStream(response, chatDelta('x'));
    await released;
    response.end(chatEnd());
  });
  const provider = { type: 'openai-compatible', base_url: upstream.url };
  const env = { MODEL_PROVIDERS: JSON.stringify({ upstream: provider }) };
  server = await startTestApp(env);
  api = await startTestApp({ ...env, ROLE: 'api' }, server.database);
  studio = new Studio(server.url);
});
afterAll(async () => {
  await api.close();
  await server.close();
  await upstream.stop();
});

/** A client that watches, from the moment that its first message is there. */
class Watcher {
  readonly messages: StatusMessage[] = [];
  ids: string[] = [];
  raw = '';
  ended = false;
  private readonly leaving = new AbortController();

  constructor(
    private readonly path: string,
    private readonly urls: string[] = [server.url],
  ) {}

  static async open(path: string, lastEventId?: string): Promise<Watcher> {
    const watcher = new Watcher(path);
    await watcher.connect(lastEventId);
    return watcher;
  }

  /** Reads until it is left, at any of its addresses. */
  async connect(lastEventId?: string): Promise<void> {
    const url = this.urls[randomInt(this.urls.length)] ?? '';
    const headers = lastEventId === undefined ? undefined : { 'Last-Event-ID': lastEventId };
    const response = await fetch(url + this.path, { headers, signal: this.leaving.signal });
    expect(response.status).toBe(200);
    expect(response.headers.get('content-type')).toBe('text/event-stream; charset=utf-8');
    void this.read(response).catch((error: unknown) => {
      if (!this.leaving.signal.aborted) throw error;
    });
  }

  /** Reads some messages, then breaks the connection off and comes back, again and again until `done`. */
  async readInPieces(done: () => boolean): Promise<void> {
    while (!done()) {
      const id = this.ids.at(-1);
      const headers = id === undefined ? undefined : { 'Last-Event-ID': id };
      const leaving = new AbortController();
      const url = this.urls[randomInt(this.urls.length)] ?? '';
      const most = this.messages.length + randomInt(1, 12);
      const timer = setTimeout(() => leaving.abort(), 700); // it may be the last piece, or empty
      try {
        const response = await fetch(url + this.path, { headers, signal: leaving.signal });
        await this.read(response, () => this.messages.length >= most);
      } catch (error) {
        if (!leaving.signal.aborted) throw error;
      } finally {
        clearTimeout(timer);
        leaving.abort();
      }
    }
  }

  changes(): StatusChange[] {
    return this.messages.filter((message) => message.type !== 'snapshot');
  }

  leave(): void {
    this.leaving.abort();
  }

  private async read(response: Response, enough: () => boolean = () => false): Promise<void> {
    const parser = createParser({
      onEvent: ({ id = '', data }) => {
        if (enough()) return;
        const message = JSON.parse(data) as StatusMessage;
        expect(id).toBe(String(message.sequence));
        this.messages.push(message);
        this.ids.push(id);
      },
    });
    const decoder = new TextDecoder();
    for await (const bytes of response.body ?? []) {
      const text = decoder.decode(bytes as Uint8Array, { stream: true });
      this.raw += text;
      parser.feed(text);
      if (enough()) return;
    }
    this.ended = true;
  }
}

const ALL = '/api/executions/events';
const run = (deployment_name: string) =>
  studio.execute<{ execution_id: string }>({ deployment_name, query: 'x' });

describe('who watches', () => {
  it('gets a snapshot, and then every change of status once, in order', async () => {
    const held = await studio.deploy(upstreamAgent());
    const quick = await studio.deploy(echo());
    const before = await studio.stream({ deployment_name: held, query: 'x' });
    await until(() => (upstream.requests.length > 0 ? true : undefined));
    const watcher = await Watcher.open(ALL);
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
    const runs = 150;
    let begun = 0;
    let ended = false;
    const watchers: { watcher: Watcher; reading: Promise<void> }[] = [];
    const watch = () => {
      const watcher = new Watcher(path, [server.url, api.url]);
      const isDone = () => ended && watcher.changes().some((change) => change.sequence >= lastSequence);
      watchers.push({ watcher, reading: watcher.readInPieces(isDone) });
    };
    let lastSequence = Infinity;
    const ids: string[] = [];
    const client = async () => {
      while (begun < runs) {
        if (begun++ % 15 === 0) watch();
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
    expect(watchers.length).toBeGreaterThanOrEqual(10);
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
    const first = await Watcher.open(path);
    await until(() => first.messages[0]);
    await run(deployment);
    await until(() => first.changes().length === 3 || undefined);
    first.leave();
    await run(deployment);
    const again = await Watcher.open(path, first.ids[1]);
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
    const byQuery = await Watcher.open(`${path}&after=${first.ids[1]}`);
    await until(() => byQuery.messages.length === 5 || undefined);
    expect(byQuery.messages).toEqual(again.messages);
    byQuery.leave();

    await server.database.query('DELETE FROM status_event WHERE sequence <= $1', [Number(first.ids[2])]);
    for (const id of [first.ids[1], '999999999999999']) {
      const late = await Watcher.open(path, id);
      expect(await until(() => late.messages[0])).toMatchObject({ type: 'snapshot' });
      late.leave();
    }
  });

  it('gets only what passes the filter', async () => {
    const [one, other] = [await studio.deploy(echo()), await studio.deploy(echo())];
    const ended = await Watcher.open(`${ALL}?deployment_name=${one}&status=completed,error`);
    const nowhere = await Watcher.open(`${ALL}?environment=nowhere`);
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
    const ofWorkflow = await Watcher.open(`${ALL}?workflow_id=${workflow_id}&after=0`);
    await until(() => ofWorkflow.changes().length === 3 || undefined);
    expect(new Set(ofWorkflow.changes().map(({ deployment_name }) => deployment_name))).toEqual(
      new Set([other]),
    );
    for (const watcher of [ended, nowhere, ofWorkflow]) watcher.leave();
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
    const watcher = await Watcher.open(`/api/deployments/${name}/events`);
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

it('ends its streams in good order when the server shuts down, and leaves none open', async () => {
  const second = await startTestApp({ ROLE: 'api' }, server.database);
  const watcher = new Watcher(ALL, [second.url]);
  await watcher.connect();
  await until(() => watcher.messages[0]);
  await second.close();
  await until(() => watcher.ended || undefined);
  await until(async () => {
    const metrics = await (await fetch(`${server.url}/metrics`)).text();
    return /^agent_studio_open_streams 0$/m.test(metrics) || undefined;
  });
});

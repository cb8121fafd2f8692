import type { ServerResponse } from 'node:http';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, expect, it } from '@jest/globals';
import { startTestApp } from '../support/app.js';
import type { TestApp } from '../support/app.js';
import { NGINX, Nginx } from '../support/nginx.js';
import { Studio, faultsOfStream, textOf, until, upstreamAgent } from '../support/studio.js';
import { Upstream, chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import { WsClient } from '../support/ws-client.js';

/** Longer than nginx waits for the server. */
const SILENCE_MS = 5000;
const READ_TIMEOUT = '2s';

let upstream: Upstream;
let app: TestApp;
let nginx: Nginx;
let deployment: string;
/** The answers that the model owes, by the query: the tests write them. */
const answers = new Map<string, ServerResponse>();

// What is missing fails in CI, where all of it is installed.
const test = NGINX || process.env['CI'] ? it : it.skip;

beforeAll(async () => {
  upstream = await Upstream.start((response, { body }) => {
    const messages = body.messages as { content: string }[];
    answers.set(messages.at(-1)?.content ?? '', response);
  });
  const provider = { type: 'openai-compatible', base_url: upstream.url };
  app = await startTestApp({
    MODEL_PROVIDERS: JSON.stringify({ upstream: provider }),
    HEARTBEAT_INTERVAL_MS: '500',
  });
  deployment = await new Studio(app.url).deploy(upstreamAgent());
  if (NGINX) nginx = await Nginx.start(app.url, READ_TIMEOUT);
});
afterAll(async () => {
  await nginx?.close();
  await app.close();
  await upstream.stop();
});

test('through nginx chunks arrive one by one, and a silence that is longer than its patience survives', async () => {
  const client = await WsClient.open(nginx.url);
  const queries = ['first', 'second'];
  const runs = await Promise.all(
    queries.map((query) => client.execute({ deployment_name: deployment, query })),
  );
  for (let word = 1; word <= 5; word++) {
    for (const [index, query] of queries.entries()) {
      writeStream(await until(() => answers.get(query)), chatDelta(`word ${word} `));
      // The next one is not said before this one has arrived.
      await client.until(() => client.frames(runs[index]?.id ?? '').length === word + 1);
    }
  }
  await sleep(SILENCE_MS);
  expect(client.closed).toBeUndefined();
  for (const [index, query] of queries.entries()) {
    const answer = await until(() => answers.get(query));
    writeStream(answer, chatEnd());
    answer.end();
    const frames = await client.whole(runs[index]?.id ?? '');
    expect(faultsOfStream(frames, runs[index]?.executionId ?? '')).toEqual([]);
    expect(textOf(frames)).toBe('word 1 word 2 word 3 word 4 word 5 ');
  }
  await client.close();
});

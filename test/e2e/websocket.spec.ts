import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { startTestApp } from '../support/app.js';
import type { TestApp } from '../support/app.js';
import { Studio, echo, faultsOfStream } from '../support/studio.js';
import { WsClient } from '../support/ws-client.js';

let app: TestApp;
let studio: Studio;
let deployment: string;

beforeAll(async () => {
  app = await startTestApp();
  studio = new Studio(app.url);
  deployment = await studio.deploy(echo());
});
afterAll(() => app.close());

describe('execute', () => {
  it('sends the chunks that an SSE client gets, to the byte', async () => {
    const client = await WsClient.open(app.url);
    const { id, executionId } = await client.execute({ deployment_name: deployment, query: 'hällo 🌍' });
    const sse = (await studio.follow(executionId)).frames();
    const frames = await client.whole(id);
    expect(faultsOfStream(frames, executionId)).toEqual([]);
    expect(frames.map(({ id: at, data }) => [at, data])).toEqual(
      (await sse).map(({ id: at, data }) => [at, data]),
    );
    expect(client.answers.map(({ event }) => event)).toEqual([
      'accepted',
      ...frames.map(() => 'chunk'),
      'end',
    ]);
    await client.close();
  });
});

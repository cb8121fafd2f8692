import { expect, it } from '@jest/globals';
import { startTestApp } from '../support/app.js';
import { Studio, faultsOfStream, textOf, upstreamAgent } from '../support/studio.js';
import { Upstream, chatDelta, chatEnd, writeStream } from '../support/upstream.js';

it('a server that shuts down ends its streams without a terminal chunk, and another one goes on', async () => {
  const calls = new Map<string, number>();
  const upstream = await Upstream.start((response, { body }) => {
    const query = JSON.stringify(body.messages);
    const call = (calls.get(query) ?? 0) + 1;
    calls.set(query, call);
    writeStream(response, chatDelta(`attempt ${call} `));
    if (call === 1) return;
    writeStream(response, chatDelta('to the end'), chatEnd());
    response.end();
  });
  const env = {
    MODEL_PROVIDERS: JSON.stringify({ upstream: { type: 'openai-compatible', base_url: upstream.url } }),
  };
  const first = await startTestApp(env);
  const second = await startTestApp({ ...env, ROLE: 'api' }, first.database);
  try {
    const client = new Studio(first.url);
    const deployment = await client.deploy({
      agents: [
        { agent_id: 'greeter', agent_type: 'template', config: { template: 'hi' } },
        ...upstreamAgent().agents,
      ],
      connections: [{ source_agent_id: 'greeter', target_agent_id: 'writer' }],
    });
    const stream = await client.stream({ deployment_name: deployment, query: 'x' });
    const waiting = client.execute({ deployment_name: deployment, query: 'y' });
    const head: Awaited<ReturnType<typeof stream.frames>> = [];
    const closing: Promise<void>[] = [];
    for await (const frame of stream) {
      head.push(frame);
      if (frame.chunk.type === 'content' && closing.length === 0) closing.push(first.app.close());
    }
    expect(textOf(head)).toBe('attempt 1 ');
    expect(head.at(-1)?.chunk.type).toBe('content');
    await Promise.all(closing);
    expect((await waiting).status).toBe(503);

    const third = await startTestApp({ ...env, ROLE: 'worker' }, first.database);
    const { executionId } = stream;
    const rest = await (await new Studio(second.url).follow(executionId, head.length)).frames();
    await third.close();
    const frames = [...head, ...rest];
    expect(faultsOfStream(frames, executionId)).toEqual([]);
    const restarted = rest.findIndex(({ chunk }) => chunk.status === 'restarted');
    expect(rest[restarted]?.chunk).toMatchObject({ agent_id: 'writer', discard_after: 1 });
    expect(textOf(rest.slice(restarted))).toBe('attempt 2 to the end');
    const { body } = await new Studio(second.url).json<{ items: { agent_id: string; attempt: number }[] }>(
      `/api/executions/${executionId}/steps`,
    );
    expect(body.items.map(({ agent_id, attempt }) => [agent_id, attempt])).toEqual([
      ['greeter', 1],
      ['writer', 2],
    ]);
  } finally {
    await second.close();
    await first.database.drop();
    await upstream.stop();
  }
});

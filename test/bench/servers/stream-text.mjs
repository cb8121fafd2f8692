// What a server without Agent Studio would be: `streamText` of the AI SDK, each piece of text written as a frame.
// No database: nothing of it can be read again.
import { randomUUID } from 'node:crypto';
import { createServer } from 'node:http';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { streamText } from 'ai';
import { announce } from '../child.mjs';
import { SSE_HEADERS, frame, readModel } from '../streams.mjs';

const provider = createOpenAICompatible({
  name: 'bench',
  baseURL: process.env.UPSTREAM_URL,
  includeUsage: true,
});
const models = new Map();

announce(
  createServer(async (request, response) => {
    const name = await readModel(request);
    if (!models.has(name)) models.set(name, provider(name));
    const executionId = randomUUID();
    let sequence = 0;
    const write = (content) => response.write(frame(executionId, ++sequence, content));
    response.writeHead(200, SSE_HEADERS);
    write({ type: 'status', status: 'started' });
    let status = 'completed';
    const { textStream } = streamText({
      model: models.get(name),
      prompt: 'Count.',
      onError: ({ error }) => {
        status = 'error';
        console.error(error);
      },
    });
    for await (const text of textStream) write({ type: 'content', data: text });
    write({ type: 'status', status });
    response.end();
  }),
);

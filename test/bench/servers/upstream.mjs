// A model provider with the streaming Chat Completions API of OpenAI; how fast its tokens come is in the model's name.
import { createServer } from 'node:http';
import { announce } from '../child.mjs';
import { CHUNKS, delayOf, pace, token } from '../streams.mjs';

/** Ready to be written, so that this server costs as little as can be. */
const answers = new Map();

announce(
  createServer({ keepAliveTimeout: 60_000 }, (request, response) => {
    const pieces = [];
    request.on('data', (piece) => pieces.push(piece));
    request.on('end', () => {
      const { model } = JSON.parse(Buffer.concat(pieces).toString());
      response.writeHead(200, {
        'Content-Type': 'text/event-stream; charset=utf-8',
        'Cache-Control': 'no-cache',
      });
      respond(response, model);
    });
  }),
);

function respond(response, model) {
  let answer = answers.get(model);
  if (answer === undefined) answers.set(model, (answer = prepare(model)));
  const delay = delayOf(model);
  if (delay === 0) {
    response.end(answer.whole);
    return;
  }
  response.write(answer.begin);
  pace(
    { count: CHUNKS, delay },
    {
      write: (index) => response.write(answer.tokens[index]),
      end: () => response.end(answer.end),
      isOver: () => response.destroyed,
    },
  );
}

function prepare(model) {
  const event = (fields) =>
    Buffer.from(
      `data: ${JSON.stringify({
        id: 'chatcmpl-benchmark',
        object: 'chat.completion.chunk',
        created: 1_700_000_000,
        model,
        system_fingerprint: 'fp_benchmark',
        ...fields,
      })}\n\n`,
    );
  const choice = (delta, finish_reason = null) => ({
    choices: [{ index: 0, delta, logprobs: null, finish_reason }],
  });
  const begin = event(choice({ role: 'assistant', content: '' }));
  const tokens = Array.from({ length: CHUNKS }, (_, index) => event(choice({ content: token(index) })));
  const usage = { prompt_tokens: 10, completion_tokens: CHUNKS, total_tokens: CHUNKS + 10 };
  const end = Buffer.concat([
    event(choice({}, 'stop')),
    event({ choices: [], usage }),
    Buffer.from('data: [DONE]\n\n'),
  ]);
  return { begin, tokens, end, whole: Buffer.concat([begin, ...tokens, end]) };
}

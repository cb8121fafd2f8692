// A model provider with the streaming Chat Completions API of OpenAI; what it answers, and how fast, is in the model's name.
import { createServer } from 'node:http';
import { announce } from '../child.mjs';
import { clockUs, pace, readModelName, token } from '../streams.mjs';

/** In a token that is stamped; no text of an event has it otherwise. */
const STAMP = '@';

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
      let answer = answers.get(model);
      if (answer === undefined) answers.set(model, (answer = prepare(model)));
      if (answer.wait > 0) setTimeout(respond, answer.wait, response, answer);
      else respond(response, answer);
    });
  }),
);

function respond(response, answer) {
  const { delay, open } = answer;
  const end = (last) => (open ? response.write(last) : response.end(last));
  if (delay === 0) {
    end(answer.whole);
    return;
  }
  response.write(answer.begin);
  pace(
    { count: answer.count, delay },
    {
      write: (index) => response.write(answer.tokenAt(index)),
      end: () => end(answer.end),
      isOver: () => response.destroyed,
    },
  );
}

function prepare(model) {
  const { tokens: count, size, delay, wait, open, stamp } = readModelName(model);
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
  const tokens = Array.from({ length: count }, (_, index) => event(choice({ content: token(index, size) })));
  const usage = { prompt_tokens: 10, completion_tokens: count, total_tokens: count + 10 };
  const last = [event(choice({}, 'stop')), event({ choices: [], usage }), Buffer.from('data: [DONE]\n\n')];
  const end = Buffer.concat(open ? [] : last);
  const [before, after] = event(choice({ content: STAMP }))
    .toString()
    .split(STAMP);
  const tokenAt = stamp ? () => before + clockUs() + after : (index) => tokens[index];
  return { count, delay, wait, open, begin, tokenAt, end, whole: Buffer.concat([begin, ...tokens, end]) };
}

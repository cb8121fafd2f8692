import type { ServerResponse } from 'node:http';
import { afterEach, describe, expect, it } from '@jest/globals';
import { AppError, TransientError } from '../../src/errors.js';
import type { ModelPart } from '../../src/models/model-registry.js';
import {
  CUT_MESSAGE,
  collect,
  failureOf,
  generate,
  query,
  startModel,
  stopModels,
  textOf,
} from '../support/models.js';
import type { ProviderType } from '../support/models.js';
import { chatDelta, chatEnd, chatEvent, messageEvent, writeStream } from '../support/upstream.js';

/** Reached by an upstream that says nothing at all. */
const SILENT_MS = 500;
/** Reached by an upstream that stops in the middle, and long enough for what it says before. */
const STOPPED_MS = 500;

afterEach(stopModels);

describe('an upstream that falls silent', () => {
  it('before its first byte: time-out, and its socket is closed', async () => {
    const { model, upstream } = await startModel(() => undefined, { timeout_ms: SILENT_MS });

    for (const call of [collect, generate]) {
      const error = await failureOf(call(model));
      expect(error).toBeInstanceOf(TransientError);
      expect(error.code).toBe('timeout');
      expect(error.message).toContain('"p"');
    }
    await expect(Promise.all(upstream.requests.map(({ closed }) => closed))).resolves.toEqual([true, true]);
  });

  it('between two tokens: time-out after the text so far', async () => {
    const { model, upstream } = await startModel((response) => writeStream(response, chatDelta('a')), {
      timeout_ms: STOPPED_MS,
    });
    const parts: ModelPart[] = [];

    const error = await failureOf(collect(model, { parts }));

    expect(error).toBeInstanceOf(TransientError);
    expect(error.code).toBe('timeout');
    expect(textOf(parts)).toBe('a');
    await expect(upstream.requests[0]?.closed).resolves.toBe(true);
  });

  it('in the middle of an answer in one piece', async () => {
    const { model } = await startModel((response) => response.writeHead(200).write('{"id":'), {
      timeout_ms: SILENT_MS,
    });

    expect((await failureOf(generate(model))).code).toBe('timeout');
  });

  it('because its reader is slow: not its fault', async () => {
    const { model: silent } = await startModel(() => undefined, { timeout_ms: STOPPED_MS });
    const { model } = await startModel(
      (response) => {
        writeStream(response, chatDelta('a'), chatDelta('b'), chatEnd());
        response.end();
      },
      { timeout_ms: STOPPED_MS },
    );

    let text = '';
    for await (const batch of model.stream(query, new AbortController().signal)) {
      text += textOf(batch);
      // Lasts for as long as the time-out.
      expect((await failureOf(generate(silent))).code).toBe('timeout');
    }
    expect(text).toBe('ab');
  });
});

it('a process that is held up itself does not blame the upstream', async () => {
  const steps: (() => void)[] = [];
  const { model } = await startModel(
    (response) => {
      writeStream(response, chatDelta('a'));
      steps.push(
        () =>
          response.write(chatDelta('b'), () => {
            // Holds up the whole process for longer than the time-out, with the second token on its way.
            Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, STOPPED_MS + 100);
          }),
        () => response.end(chatEnd()),
      );
    },
    { timeout_ms: STOPPED_MS },
  );

  let text = '';
  for await (const batch of model.stream(query, new AbortController().signal)) {
    text += textOf(batch);
    const step = steps.shift();
    if (step !== undefined) setImmediate(step);
  }

  expect(text).toBe('ab');
});

describe('an upstream that breaks', () => {
  const reset = (response: ServerResponse): void => {
    response.socket?.resetAndDestroy();
  };

  it('resets the connection in the middle of an event', async () => {
    const { model } = await startModel((response) => {
      writeStream(response, chatDelta('a'));
      response.write('data: {"id":"c1","cho', () => reset(response));
    });
    const parts: ModelPart[] = [];

    const error = await failureOf(collect(model, { parts }));

    expect(error).toBeInstanceOf(TransientError);
    expect(error.code).toBe('model_error');
    expect(error.message).toContain('"p" broke');
  });

  it('resets each connection before it answers', async () => {
    const { model, upstream } = await startModel(reset);

    for (const call of [collect, generate]) {
      const error = await failureOf(call(model));
      expect(error).toBeInstanceOf(TransientError);
      expect(error.code).toBe('model_error');
    }
    expect(upstream.requests.length).toBeLessThanOrEqual(4);
  });

  it('is not there', async () => {
    const { model, upstream } = await startModel(() => undefined);
    await upstream.stop();

    for (const call of [collect, generate]) {
      const error = await failureOf(call(model));
      expect(error).toBeInstanceOf(TransientError);
      expect(error.message).toContain('ECONNREFUSED');
    }
  });

  it('a kept connection that it closes at the moment of its reuse costs no failure', async () => {
    const used = new Set<unknown>();
    let resets = 0;
    const { model } = await startModel((response) => {
      if (used.has(response.socket) && resets === 0) {
        resets++;
        return reset(response);
      }
      used.add(response.socket);
      writeStream(response, chatDelta('a'), chatEnd());
      response.end();
    });

    for (let i = 0; i < 6; i++) expect(textOf(await collect(model))).toBe('a');
    expect(resets).toBe(1);
  });

  it('announces more than it may send', async () => {
    const { model } = await startModel((response) => {
      response
        .writeHead(200, { 'content-type': 'application/json', 'content-length': '9999999999' })
        .write('{');
    });

    const error = await failureOf(generate(model));

    expect(error.constructor).toBe(AppError);
    expect(error.code).toBe('model_error');
  });

  it.each<ProviderType>(['openai-compatible', 'openai', 'anthropic'])(
    '%s: closes in an orderly fashion before the end: not taken for the end',
    async (type) => {
      const { model } = await startModel(
        (response) => {
          writeStream(response, type === 'anthropic' ? CUT_MESSAGE : chatDelta('a'));
          response.end();
        },
        { type },
      );
      const parts: ModelPart[] = [];

      const error = await failureOf(collect(model, { parts }));

      expect(error).toBeInstanceOf(TransientError);
      expect(error.code).toBe('model_error');
      expect(parts).toEqual([{ type: 'text', text: 'a' }]);
    },
  );

  it.each<{ what: string; type: ProviderType; event: string }>([
    { what: 'half JSON', type: 'openai-compatible', event: 'data: {"id":"c1","choices":[{"delta"\n\n' },
    {
      what: 'half JSON',
      type: 'anthropic',
      event: 'event: content_block_delta\ndata: {"type":"content_bl\n\n',
    },
    { what: 'JSON of another kind', type: 'openai-compatible', event: 'data: [1, "sk-secret"]\n\n' },
    { what: 'HTML', type: 'openai', event: 'data: <html>sk-secret</html>\n\n' },
  ])('$type: sends $what', async ({ type, event }) => {
    const { model } = await startModel(
      (response) => {
        const start = messageEvent('message_start', {
          message: {
            id: 'm',
            model: 'm',
            role: 'assistant',
            content: [],
            usage: { input_tokens: 1, output_tokens: 1 },
          },
        });
        writeStream(response, type === 'anthropic' ? start : chatDelta('a'), event, chatEnd());
        response.end();
      },
      { type },
    );

    const error = await failureOf(collect(model));

    expect(error.constructor).toBe(AppError);
    expect(error.code).toBe('model_error');
    expect(error.message).not.toContain('sk-secret');
  });

  it.each(['', '{"choices":[', '<html>sk-secret</html>', '{"choices":[]}', '[]'])(
    'answers %j instead of an answer in one piece',
    async (body) => {
      const { model } = await startModel((response) => response.writeHead(200).end(body));

      const error = await failureOf(generate(model));

      expect(error.constructor).toBe(AppError);
      expect(error.code).toBe('model_error');
      expect(error.message).not.toContain('sk-secret');
    },
  );

  it.each([
    { error: { message: 'sk-secret', type: 'server_error' }, kind: TransientError },
    { error: { message: 'sk-secret', code: 502 }, kind: TransientError },
    { error: { message: 'sk-secret', type: 'rate_limit_error' }, kind: TransientError },
    { error: { message: 'sk-secret', code: 'insufficient_quota' }, kind: AppError },
    { error: { message: 'sk-secret', type: 'invalid_request_error' }, kind: AppError },
    { error: { message: 'sk-secret', code: 400 }, kind: AppError },
  ])('reports $error in its stream', async ({ error: reported, kind }) => {
    const { model } = await startModel((response) => {
      writeStream(response, chatDelta('a'), chatEvent({ error: reported }), chatEnd());
      response.end();
    });
    const parts: ModelPart[] = [];

    const error = await failureOf(collect(model, { parts }));

    expect(error.constructor).toBe(kind);
    expect(error.code).toBe('model_error');
    expect(error.message).not.toContain('sk-secret');
    expect(textOf(parts)).toBe('a');
  });

  it.each([
    { headers: { 'retry-after': '7' }, retryAfter: 7 },
    { headers: { 'retry-after-ms': '1500', 'retry-after': '7' }, retryAfter: 2 },
    { headers: { 'retry-after': 'Thu, 01 Jan 1970 00:00:00 GMT' }, retryAfter: 0 },
    { headers: { 'retry-after': 'soon' }, retryAfter: undefined },
    { headers: { 'retry-after': '' }, retryAfter: undefined },
    { headers: {}, retryAfter: undefined },
  ])('is busy, with the headers $headers', async ({ headers, retryAfter }) => {
    const { model } = await startModel((response) => response.writeHead(503, headers).end());

    expect((await failureOf(collect(model))).retryAfter).toBe(retryAfter);
  });
});

describe('an upstream that does not end', () => {
  const env = { MAX_AGENT_OUTPUT: '1000', OPENAI_API_KEY: 'k', ANTHROPIC_API_KEY: 'k' };
  const more = 'x'.repeat(64 * 1024);
  /** Sends the same again and again, for as long as somebody reads it. */
  const send = (response: ServerResponse, piece: string) => {
    const say = () => {
      while (!response.destroyed && response.write(piece));
    };
    response.on('drain', say);
    say();
  };

  it.each<[string, (response: ServerResponse) => void]>([
    ['its event', (response) => (writeStream(response, 'data: '), send(response, more))],
    ['the lines of its event', (response) => (writeStream(response), send(response, `data: ${more}\n`))],
    [
      'its reasoning',
      (response) => {
        writeStream(response);
        send(response, chatEvent({ choices: [{ index: 0, delta: { reasoning_content: 'hmm' } }] }));
      },
    ],
  ])('%s', async (_name, answer) => {
    const { model, upstream } = await startModel(answer, { env });
    const error = await failureOf(collect(model));
    expect(error).toMatchObject({ code: 'output_too_large', limit: 'provider' });
    await expect(upstream.requests[0]?.closed).resolves.toBe(true);
  });

  it.each<ProviderType>(['openai-compatible', 'openai', 'anthropic'])(
    'its answer in one piece (%s)',
    async (type) => {
      const { model, upstream } = await startModel(
        (response) => {
          response.writeHead(200, { 'content-type': 'application/json' });
          send(response, more);
        },
        { env, type },
      );
      const error = await failureOf(generate(model));
      expect(error).toMatchObject({ code: 'output_too_large', limit: 'provider' });
      await expect(upstream.requests[0]?.closed).resolves.toBe(true);
    },
  );

  it('its error', async () => {
    const { model, upstream } = await startModel(
      (response) => {
        response.writeHead(401, { 'content-type': 'application/json' });
        send(response, more);
      },
      { env },
    );
    for (const call of [collect, generate])
      expect(await failureOf(call(model))).toMatchObject({
        code: 'model_error',
        message: expect.stringContaining('401'),
      });
    await expect(upstream.requests[1]?.closed).resolves.toBe(true);
  });

  it('its stream of events, each of which is short: not its fault', async () => {
    const { model } = await startModel(
      (response) => {
        writeStream(response);
        // An event longer than what is kept of it in pieces that never hold an event's whole end.
        for (let event = 0; event < 40; event++) {
          response.write(`data: ${chatDelta('a').slice(6, -2)}\n`);
          response.write(`: ${more}\n`);
          response.write('\n');
        }
        response.end(chatEnd());
      },
      { env },
    );
    expect(textOf(await collect(model))).toBe('a'.repeat(40));
  });
});

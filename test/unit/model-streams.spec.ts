import diagnostics from 'node:diagnostics_channel';
import { getEventListeners } from 'node:events';
import { afterEach, describe, expect, it, jest } from '@jest/globals';
import { Agent } from 'undici';
import { createUpstreamFetch } from '../../src/models/upstream-fetch.js';
import type { Model, ModelPart } from '../../src/models/model-registry.js';
import { rounds } from '../support/effort.js';
import {
  CUT_MESSAGE,
  PATIENT_MS,
  WHOLE_MESSAGE,
  collect,
  failureOf,
  generate,
  query,
  startModel,
  stopModels,
  textOf,
} from '../support/models.js';
import type { ProviderType } from '../support/models.js';
import { chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import type { UpstreamAnswer } from '../support/upstream.js';

afterEach(stopModels);

describe('text that is hard to carry', () => {
  it('arrives as the model wrote it', async () => {
    const texts = [
      '\r',
      '\n',
      '\r\n\r\n',
      '\u2028\u2029\u0085',
      'a\u0000b',
      '\ufeffbom',
      '\ud83d',
      '\ude00',
      '\ud83d\ude00',
      '\n\nevent: x\ndata: y\n\n',
      'data: [DONE]',
      '{"__proto__": 1}',
      '\\u0000',
      ' ',
    ];
    const { model } = await startModel((response) => {
      writeStream(response, ...texts.map(chatDelta), chatEnd());
      response.end();
    });

    const parts = await collect(model);

    expect(parts.flatMap((part) => (part.type === 'text' ? [part.text] : []))).toEqual(texts);
  });

  it('an emoji split over two packets stays whole', async () => {
    const event = Buffer.from(chatDelta('x😀y'));
    const cut = event.indexOf(Buffer.from('😀')) + 2;
    let sendRest = (): void => undefined;
    const { model } = await startModel((response) => {
      writeStream(response, chatDelta('a'), event.subarray(0, cut));
      sendRest = () => response.end(Buffer.concat([event.subarray(cut), Buffer.from(chatEnd())]));
    });

    let text = '';
    for await (const batch of model.stream(query, new AbortController().signal)) {
      text += textOf(batch);
      if (text === 'a') sendRest();
    }

    expect(text).toBe('ax😀y');
  });

  it('an event cut at each of its bytes is put together again', async () => {
    const step = rounds(1, 8);
    const bytes = Buffer.from(`${chatDelta('é\u2028😀')}${chatEnd()}`);
    const { model, upstream } = await startModel((response) => {
      const cut = upstream.requests.length * step;
      writeStream(response);
      response.write(bytes.subarray(0, cut), () => response.end(bytes.subarray(cut)));
    });

    for (let cut = 0; cut < bytes.length; cut += step) expect(textOf(await collect(model))).toBe('é\u2028😀');
  });

  it.each<ProviderType>(['openai-compatible', 'openai'])('%s: empty pieces are no parts', async (type) => {
    const { model } = await startModel(
      (response) => {
        writeStream(response, chatDelta(''), chatDelta('a'), chatDelta(''), ': a comment\n\n', chatEnd());
        response.end();
      },
      { type },
    );

    expect(await collect(model)).toEqual([
      { type: 'text', text: 'a' },
      { type: 'finish', usage: { input_tokens: 3, output_tokens: 5 } },
    ]);
  });
});

describe('a call that is not wanted any more', () => {
  const reason = new Error('nobody wants it');

  it.each<ProviderType>(['openai-compatible', 'openai', 'anthropic'])(
    '%s: aborted before the first byte, the socket is closed',
    async (type) => {
      const { model, upstream } = await startModel(() => undefined, { type });
      for (const [index, start] of [collect, generateWith].entries()) {
        const abort = new AbortController();
        const call = start(model, { signal: abort.signal });
        const request = await upstream.request(index);

        abort.abort(reason);

        await expect(call).rejects.toBe(reason);
        await expect(request.closed).resolves.toBe(true);
        expect(getEventListeners(abort.signal, 'abort')).toHaveLength(0);
      }
    },
  );

  it.each<ProviderType>(['openai-compatible', 'openai', 'anthropic'])(
    '%s: aborted between two tokens, the socket is closed and no part follows',
    async (type) => {
      const { model, upstream } = await startModel(
        (response) => writeStream(response, type === 'anthropic' ? CUT_MESSAGE : chatDelta('a')),
        { type },
      );
      const abort = new AbortController();
      const parts: ModelPart[] = [];

      await expect(
        (async () => {
          for await (const batch of model.stream(query, abort.signal)) {
            parts.push(...batch);
            abort.abort(reason);
          }
        })(),
      ).rejects.toBe(reason);

      await expect(upstream.requests[0]?.closed).resolves.toBe(true);
      expect(parts).toEqual([{ type: 'text', text: 'a' }]);
      expect(getEventListeners(abort.signal, 'abort')).toHaveLength(0);
    },
  );

  it('aborted while many tokens wait to be read: none of them follows', async () => {
    const { model } = await startModel((response) => {
      writeStream(response, ...Array.from({ length: 1000 }, (_, i) => chatDelta(`${i} `)), chatEnd());
      response.end();
    });
    const abort = new AbortController();
    const parts: ModelPart[] = [];

    const stream = model.stream(query, abort.signal);
    await expect(
      (async () => {
        for await (const batch of stream) {
          parts.push(...batch);
          if (parts.length === 3) abort.abort(reason);
        }
      })(),
    ).rejects.toBe(reason);

    expect(parts).toHaveLength(3);
  });

  it('aborted before it began: no request is made', async () => {
    const { model, upstream } = await startModel(() => undefined);

    await expect(collect(model, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
    await expect(generateWith(model, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
    expect(upstream.connections).toBe(0);
  });

  it('its reader stops early: the socket is closed', async () => {
    const { model, upstream } = await startModel((response) => writeStream(response, chatDelta('a')));
    const abort = new AbortController();

    for await (const batch of model.stream(query, abort.signal)) {
      expect(textOf(batch)).toBe('a');
      break;
    }

    await expect(upstream.requests[0]?.closed).resolves.toBe(true);
    expect(getEventListeners(abort.signal, 'abort')).toHaveLength(0);
  });

  it('its answer is there and thrown away unread: the process lives on', async () => {
    const { upstream } = await startModel((response) => response.end('all of it'));
    const connections = new Agent();
    const complete = new Promise<void>((resolve) => {
      diagnostics.subscribe('undici:request:trailers', () => resolve());
    });

    const response = await createUpstreamFetch(connections, 1_000_000)(upstream.url, {
      method: 'POST',
      body: '{}',
    });
    await complete;
    await response.body?.cancel();
    await new Promise((resolve) => setImmediate(resolve));

    await connections.close();
  });

  it('leaves no timer, whichever way it ended', async () => {
    const set = jest.spyOn(globalThis, 'setTimeout');
    const clear = jest.spyOn(globalThis, 'clearTimeout');
    const whole: UpstreamAnswer = (response) => {
      writeStream(response, chatDelta('a'), chatEnd());
      response.end();
    };

    await collect((await startModel(whole)).model);
    await failureOf(generate((await startModel((response) => response.writeHead(500).end())).model));
    await failureOf(collect((await startModel((response) => response.writeHead(200).end())).model));
    for await (const batch of (await startModel(whole)).model.stream(query, new AbortController().signal)) {
      if (batch.length > 0) break;
    }

    const timers = set.mock.results.filter((_, index) => set.mock.calls[index]?.[1] === PATIENT_MS);
    const cleared = clear.mock.calls.map(([timer]) => timer);
    expect(timers).toHaveLength(4);
    for (const { value } of timers) expect(cleared).toContain(value);
    set.mockRestore();
    clear.mockRestore();
  });
});

describe('the connection of a complete answer', () => {
  it.each<ProviderType>(['openai-compatible', 'openai', 'anthropic'])('%s: is used again', async (type) => {
    let end = (): unknown => undefined;
    const { model, upstream } = await startModel(
      (response) => {
        end = () => response.end();
        if (type === 'anthropic') return writeStream(response, WHOLE_MESSAGE);
        writeStream(response, chatDelta('a'), chatEnd());
        end();
      },
      { type },
    );

    for (let i = 0; i < 6; i++) {
      await collect(model);
      end();
      await upstream.requests[i]?.closed;
    }

    // One that has just been freed may not be known to be free yet.
    expect(upstream.connections).toBeLessThanOrEqual(2);
  });

  it('is closed if the upstream keeps it open for no reason', async () => {
    const { model, upstream } = await startModel((response) => writeStream(response, WHOLE_MESSAGE), {
      type: 'anthropic',
    });

    expect(textOf(await collect(model))).toBe('a');
    await expect(upstream.requests[0]?.closed).resolves.toBe(true);
  });
});

async function generateWith(model: Model, { signal }: { signal: AbortSignal }): Promise<unknown> {
  return model.generate(query, signal);
}

import { afterEach, describe, expect, it, jest } from '@jest/globals';
import { AppError } from '../../src/errors.js';
import type { ModelMessage, ModelRequest } from '../../src/models/model-registry.js';
import {
  WHOLE_MESSAGE,
  collect,
  createRegistry,
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

const answerChat: UpstreamAnswer = (response) => {
  writeStream(response, chatDelta('a'), chatEnd());
  response.end();
};
const answerMessages: UpstreamAnswer = (response) => {
  writeStream(response, WHOLE_MESSAGE);
  response.end();
};

const SETTINGS: Omit<ModelRequest, 'messages'> = {
  temperature: 0.5,
  max_tokens: 99,
  top_p: 0.9,
  frequency_penalty: 0.1,
  presence_penalty: 0.2,
  seed: 7,
  stop: ['END'],
};

const SCATTERED: ModelMessage[] = [
  { role: 'system', content: 'Be brief.' },
  { role: 'system', content: ' ' },
  { role: 'user', content: 'hello' },
  { role: 'assistant', content: 'hi' },
  { role: 'system', content: 'Be kind.' },
  { role: 'user', content: '' },
  { role: 'user', content: 'bye' },
];

afterEach(stopModels);

describe('what reaches the upstream', () => {
  it.each<ProviderType>(['openai-compatible', 'openai'])(
    '%s: every setting, and a wish for usage',
    async (type) => {
      const { model, upstream } = await startModel(answerChat, { type });

      await collect(model, { request: { ...query, ...SETTINGS } });

      expect(upstream.requests[0]?.path).toBe('/v1/chat/completions');
      expect(upstream.requests[0]?.body).toEqual({
        ...SETTINGS,
        ...query,
        model: 'm/1',
        stream: true,
        stream_options: { include_usage: true },
      });
    },
  );

  it('anthropic: the settings that it has', async () => {
    const { model, upstream } = await startModel(answerMessages, { type: 'anthropic' });

    await collect(model, { request: { ...query, ...SETTINGS } });

    expect(upstream.requests[0]?.path).toBe('/v1/messages');
    expect(upstream.requests[0]?.body).toMatchObject({
      model: 'm/1',
      max_tokens: 99,
      temperature: 0.5,
      stop_sequences: ['END'],
    });
  });

  it('no list of stop sequences if there is none in it', async () => {
    const { model, upstream } = await startModel(answerChat);

    await collect(model, { request: { ...query, stop: [] } });

    expect(upstream.requests[0]?.body).not.toHaveProperty('stop');
  });

  it.each<ProviderType>(['openai-compatible', 'openai'])(
    '%s: system messages where they stood',
    async (type) => {
      const { model, upstream } = await startModel(answerChat, { type });

      await collect(model, { request: { messages: SCATTERED } });

      expect(upstream.requests[0]?.body['messages']).toEqual(SCATTERED);
    },
  );

  it('anthropic: one system prompt, no system message, and nothing blank, which it would refuse', async () => {
    const { model, upstream } = await startModel(answerMessages, { type: 'anthropic' });

    await collect(model, { request: { messages: SCATTERED } });

    expect(upstream.requests[0]?.body['system']).toEqual([{ type: 'text', text: 'Be brief.\n\nBe kind.' }]);
    expect(upstream.requests[0]?.body['messages']).toEqual([
      { role: 'user', content: [{ type: 'text', text: 'hello' }] },
      { role: 'assistant', content: [{ type: 'text', text: 'hi' }] },
      { role: 'user', content: [{ type: 'text', text: 'bye' }] },
    ]);
  });

  it('nothing is printed, whatever the AI SDK would like to warn about', async () => {
    const { model } = await startModel(answerMessages, { type: 'anthropic' });
    const prints = [
      jest.spyOn(process.stdout, 'write'),
      jest.spyOn(console, 'log'),
      jest.spyOn(console, 'info'),
      jest.spyOn(console, 'warn'),
    ];

    await collect(model, { request: { messages: SCATTERED, ...SETTINGS } });

    for (const print of prints) {
      expect(print).not.toHaveBeenCalled();
      print.mockRestore();
    }
  });
});

describe('API keys', () => {
  const env = { MY_KEY: ' sk-1\n', OPENAI_API_KEY: 'sk-2', ANTHROPIC_API_KEY: 'sk-3' };

  it.each<{ type: ProviderType; api_key_env?: string; header: string; value?: string }>([
    { type: 'openai-compatible', api_key_env: 'MY_KEY', header: 'authorization', value: 'Bearer sk-1' },
    { type: 'openai', api_key_env: 'MY_KEY', header: 'authorization', value: 'Bearer sk-1' },
    { type: 'anthropic', api_key_env: 'MY_KEY', header: 'x-api-key', value: 'sk-1' },
    { type: 'openai', header: 'authorization', value: 'Bearer sk-2' },
    { type: 'anthropic', header: 'x-api-key', value: 'sk-3' },
    { type: 'openai-compatible', header: 'authorization' },
  ])('$type with api_key_env $api_key_env sends its own key only', async ({ header, value, ...options }) => {
    const answer = options.type === 'anthropic' ? answerMessages : answerChat;
    const { model, upstream } = await startModel(answer, { ...options, env: { ...env } });

    const parts = await collect(model);

    expect(parts).toEqual([
      { type: 'text', text: 'a' },
      { type: 'finish', usage: { input_tokens: 3, output_tokens: 5 } },
    ]);
    expect(upstream.requests[0]?.headers[header]).toBe(value);
  });

  it.each([
    { type: 'openai', variable: 'OPENAI_API_KEY' },
    { type: 'anthropic', variable: 'ANTHROPIC_API_KEY' },
    { type: 'openai-compatible', base_url: 'http://127.0.0.1:9', api_key_env: 'MY_KEY', variable: 'MY_KEY' },
  ])('$type: a missing key is named when a model is used, not before', async ({ variable, ...settings }) => {
    const registry = createRegistry({ mine: settings });

    expect(registry.check('mine/m')).toBeUndefined();
    const error = await failureOf((async () => registry.resolve('mine/m'))());
    expect(error.code).toBe('model_not_configured');
    expect(error.message).toContain('"mine"');
    expect(error.message).toContain(variable);
  });

  it('a key that can be none is named by its variable, and not quoted', async () => {
    const registry = createRegistry({ p: { type: 'openai' } }, { OPENAI_API_KEY: 'sk-1\nsk-2' });

    const error = await failureOf((async () => registry.resolve('p/m'))());

    expect(error.code).toBe('model_not_configured');
    expect(error.message).toContain('OPENAI_API_KEY');
    expect(error.message).not.toContain('sk-');
  });

  it('a key that was changed is used by the next call', async () => {
    const changing: Record<string, string> = { OPENAI_API_KEY: 'old' };
    const { registry, upstream } = await startModel(answerChat, { type: 'openai', env: changing });

    await collect(registry.resolve('p/m'));
    changing['OPENAI_API_KEY'] = 'new';
    await collect(registry.resolve('p/m'));

    const sent = upstream.requests.map(({ headers }) => headers.authorization);
    expect(sent).toEqual(['Bearer old', 'Bearer new']);
  });

  it('a redirect does not carry the key to another place', async () => {
    const { model, upstream } = await startModel((response) =>
      response.writeHead(307, { location: '/elsewhere' }).end(),
    );

    for (const call of [collect, generate]) {
      const error = await failureOf(call(model));
      expect(error.constructor).toBe(AppError);
      expect(error.message).toContain('answered 307');
    }
    expect(upstream.requests).toHaveLength(2);
  });
});

describe('names of models', () => {
  const registry = createRegistry({ openai: { type: 'openai' } });

  it.each(['offline/echo', 'openai/gpt-5', 'openai/ft:gpt-5/mine'])('%s is known', (name) => {
    expect(registry.check(name)).toBeUndefined();
  });

  it('offline/echo answers with no provider and no key', async () => {
    expect(textOf(await collect(createRegistry({}).resolve('offline/echo')))).toContain('offline model');
  });

  it.each([
    { name: 'offline/xyz', says: 'offline/echo' },
    { name: 'gpt-5', says: 'provider/model-id' },
    { name: 'openai/', says: 'provider/model-id' },
    { name: '/gpt-5', says: 'provider/model-id' },
    { name: '', says: 'provider/model-id' },
    { name: 'opnai/gpt-5', says: 'offline, openai' },
    { name: 'constructor/m', says: 'offline, openai' },
    { name: '__proto__/m', says: 'offline, openai' },
    { name: `openai/${'m'.repeat(1000)}`, says: '300' },
  ])('what is wrong with "$name" is said', async ({ name, says }) => {
    expect(registry.check(name)).toContain(says);
    const error = await failureOf((async () => registry.resolve(name))());
    expect(error.code).toBe('model_not_configured');
  });

  it('ids made up by clients do not pile up, and push out no model in use', () => {
    const keyed = createRegistry({ openai: { type: 'openai' } }, { OPENAI_API_KEY: 'k' });
    const unused = keyed.resolve('openai/unused');
    const used = keyed.resolve('openai/used');

    for (let i = 0; i < 400; i++) {
      keyed.resolve(`openai/m${i}`);
      keyed.resolve('openai/used');
    }

    expect(keyed.resolve('openai/used')).toBe(used);
    expect(keyed.resolve('openai/unused')).not.toBe(unused);
  });
});

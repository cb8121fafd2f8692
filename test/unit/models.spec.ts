import { LLMock } from '@copilotkit/aimock';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from '@jest/globals';
import { AppError, TransientError } from '../../src/errors.js';
import type { Model, ModelMessage, ModelPart } from '../../src/models/model-registry.js';
import { stopModels, collect, createRegistry, failureOf, generate, textOf } from '../support/models.js';

const TYPES = ['openai-compatible', 'openai', 'anthropic'] as const;
type ProviderType = (typeof TYPES)[number];

const KEYS = { OPENAI_API_KEY: 'key-of-openai', ANTHROPIC_API_KEY: 'key-of-anthropic' };
const ANSWER = 'Hi there, how are you?';
const USAGE = {
  'openai-compatible': { prompt_tokens: 11, completion_tokens: 7, total_tokens: 18 },
  openai: { prompt_tokens: 11, completion_tokens: 7, total_tokens: 18 },
  anthropic: { input_tokens: 11, output_tokens: 7 },
};

const SCATTERED: ModelMessage[] = [
  { role: 'system', content: 'Be brief.' },
  { role: 'system', content: 'Be kind.' },
  { role: 'user', content: 'hello' },
  { role: 'assistant', content: 'hi' },
  { role: 'system', content: 'Be gone.' },
  { role: 'user', content: 'bye' },
];

const provider = new LLMock({ port: 0, chunkSize: 3 });

beforeAll(async () => {
  await provider.start();
});
beforeEach(() => {
  provider.reset();
});
afterEach(stopModels);
afterAll(async () => {
  await provider.stop();
});

function resolve(type: ProviderType): Model {
  return createRegistry({ p: { type, base_url: `${provider.url}/v1` } }, KEYS).resolve('p/group/model-1');
}

describe.each(TYPES)('a provider of type %s', (type) => {
  it('streams an answer in parts and ends with its usage', async () => {
    provider.onMessage('hello', { content: ANSWER, usage: USAGE[type] });

    const parts = await collect(resolve(type));

    expect(textOf(parts)).toBe(ANSWER);
    expect(parts.length).toBeGreaterThan(5);
    expect(parts.filter((part) => part.type === 'finish')).toEqual([
      { type: 'finish', usage: { input_tokens: 11, output_tokens: 7 } },
    ]);
    expect(parts.at(-1)?.type).toBe('finish');
  });

  it('answers in one piece with its usage', async () => {
    provider.onMessage('hello', { content: ANSWER, usage: USAGE[type] });

    await expect(generate(resolve(type))).resolves.toEqual({
      text: ANSWER,
      usage: { input_tokens: 11, output_tokens: 7 },
    });
  });

  it('takes system messages wherever they stand', async () => {
    provider.onMessage('bye', { content: ANSWER });

    expect(textOf(await collect(resolve(type), { request: { messages: SCATTERED } }))).toBe(ANSWER);
  });

  it('a connection cut in the middle is not the end of the answer', async () => {
    provider.onMessage('hello', { content: ANSWER }, { truncateAfterChunks: 4 });
    const parts: ModelPart[] = [];

    const error = await failureOf(collect(resolve(type), { parts }));

    expect(error).toBeInstanceOf(TransientError);
    expect(error.code).toBe('model_error');
    expect(parts.some((part) => part.type === 'finish')).toBe(false);
    expect(ANSWER.startsWith(textOf(parts))).toBe(true);
  });

  it.each([
    { status: 400, kind: AppError },
    { status: 401, kind: AppError },
    { status: 404, kind: AppError },
    { status: 429, kind: TransientError },
    { status: 500, kind: TransientError },
    { status: 529, kind: TransientError },
  ])('says that the provider answered $status, but not in which words', async ({ status, kind }) => {
    for (const call of [collect, generate]) {
      provider.nextRequestError(status, { message: 'key sk-secret of tenant 7' });

      const error = await failureOf(call(resolve(type)));

      expect(error.constructor).toBe(kind);
      expect(error.code).toBe('model_error');
      expect(error.message).toContain(`The model provider "p" answered ${status}.`);
      expect(error.message).not.toContain('sk-secret');
      expect(error.cause).toMatchObject({ statusCode: status });
    }
  });

  it('hands on how long a busy provider wants to be left alone', async () => {
    provider.onMessage('hello', { error: { message: 'slow down' }, status: 429, retryAfter: 17 });

    expect(await failureOf(collect(resolve(type)))).toMatchObject({ retryAfter: 17 });
  });
});

it('drops what a model thinks before it speaks', async () => {
  provider.onMessage('hello', { content: 'Four.', reasoning: 'Two and two.' });

  expect(textOf(await collect(resolve('openai-compatible')))).toBe('Four.');
  await expect(generate(resolve('openai-compatible'))).resolves.toMatchObject({ text: 'Four.' });
});

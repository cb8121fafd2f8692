import { describe, expect, it } from '@jest/globals';
import fc from 'fast-check';
import { EchoModel } from '../../src/models/echo.model.js';
import type { ModelMessage, ModelPart, ModelRequest } from '../../src/models/model-registry.js';

const model = new EchoModel();

async function collect(request: ModelRequest, signal = new AbortController().signal): Promise<ModelPart[][]> {
  const batches: ModelPart[][] = [];
  for await (const batch of model.stream(request, signal)) batches.push(batch);
  return batches;
}

const textsOf = (batches: ModelPart[][]): string[] =>
  batches.flat().flatMap((part) => (part.type === 'text' ? [part.text] : []));

const ask = (query: string): ModelRequest => ({ messages: [{ role: 'user', content: query }] });

const CONVERSATION: ModelMessage[] = [
  { role: 'system', content: '\nYou are a pirate.\nNever say so.' },
  { role: 'user', content: 'Ahoy' },
  { role: 'assistant', content: 'Arr' },
  { role: 'system', content: 'It is night.' },
  { role: 'user', content: 'Where is the ship?' },
  { role: 'user', content: 'The ship is in the bay.' },
  { role: 'user', content: 'The bay is in the sea.' },
];

describe('offline/echo', () => {
  it('says what it is and what it was given', async () => {
    const { text } = await model.generate({ messages: CONVERSATION }, new AbortController().signal);

    expect(text).toBe(
      [
        'This is the built-in offline model: it repeats what it was given.',
        'System prompt: You are a pirate.',
        'Earlier messages: 3',
        'Query: Where is the ship?',
        'Input 1: The ship is in the bay.',
        'Input 2: The bay is in the sea.',
      ].join('\n'),
    );
  });

  it('needs neither a system prompt nor a history, nor even a query', async () => {
    const hello = 'This is the built-in offline model: it repeats what it was given.\nEarlier messages: 0';

    expect(textsOf(await collect(ask('Hi'))).join('')).toBe(`${hello}\nQuery: Hi`);
    expect(textsOf(await collect({ messages: [] })).join('')).toBe(hello);
  });

  it('gives the same answer, streamed or in one piece, each time', async () => {
    const request = { messages: CONVERSATION };
    const batches = await collect(request);

    expect(await collect(request)).toEqual(batches);
    expect(await model.generate(request, new AbortController().signal)).toEqual({
      text: textsOf(batches).join(''),
      usage: { input_tokens: 28, output_tokens: textsOf(batches).length },
    });
  });

  it.each([
    'a\rb\nc\r\nd',
    '\u2028\u2029\u0085\u00a0\ufeff',
    'a\u0000b',
    '\ud83d',
    '\ude00 \ud83d',
    '😀'.repeat(1000),
    '\n\nevent: x\ndata: y\n\n',
    '   ',
    'x'.repeat(1_000_000),
  ])('repeats a hostile query byte for byte (%#)', async (query) => {
    expect(
      textsOf(await collect(ask(query)))
        .join('')
        .endsWith(`\nQuery: ${query}`),
    ).toBe(true);
  });

  it('any text survives being split into parts, and none of them is empty or half of an emoji', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.string({ unit: fc.constantFrom('a', ' ', '\n', '😀', '👩‍👩‍👧', '\u2028', '\u0000'), maxLength: 300 }),
        async (query) => {
          const texts = textsOf(await collect(ask(query)));
          expect(texts.join('').endsWith(query)).toBe(true);
          expect(texts.every((text) => text !== '' && Buffer.from(text).toString() === text)).toBe(true);
        },
      ),
    );
  });

  it('a system prompt of one endless line is cut between characters', async () => {
    const [, line] = textsOf(await collect({ messages: [{ role: 'system', content: '😀'.repeat(5000) }] }))
      .join('')
      .split('\n');

    expect(line).toBe(`System prompt: ${'😀'.repeat(200)}…`);
  });

  it('each word is a part, and the finish comes once, last', async () => {
    const parts = (await collect(ask('one two  three'))).flat();

    expect(parts.slice(-5)).toEqual([
      { type: 'text', text: 'Query: ' },
      { type: 'text', text: 'one ' },
      { type: 'text', text: 'two  ' },
      { type: 'text', text: 'three' },
      { type: 'finish', usage: { input_tokens: 3, output_tokens: parts.length - 1 } },
    ]);
  });

  it('stops after max_tokens parts', async () => {
    const parts = (await collect({ ...ask('one two three'), max_tokens: 4 })).flat();

    expect(textsOf([parts])).toEqual(['This ', 'is ', 'the ', 'built-in ']);
    expect(parts.at(-1)).toEqual({ type: 'finish', usage: { input_tokens: 3, output_tokens: 4 } });
  });

  it('a long answer does not hold up the event loop', async () => {
    let turns = 0;
    let running = true;
    const count = (): void => {
      turns++;
      if (running) setImmediate(count);
    };
    setImmediate(count);

    const batches = await collect(ask('word '.repeat(10_000)));
    running = false;

    expect(batches.length).toBeGreaterThan(150);
    expect(batches.every((batch) => batch.length <= 65)).toBe(true);
    expect(turns).toBeGreaterThanOrEqual(batches.length - 1);
  });

  it.each([
    ['words that are cut where they are counted', 'ab '.repeat(200_000), 200_000],
    ['one that is longer than what is counted at once', 'x'.repeat(600_000), 1],
    ['white space alone', ' '.repeat(600_000), 0],
  ])('a prompt is counted in turns: %s', async (_name, query, input_tokens) => {
    let turns = 0;
    const count = () => {
      turns++;
      counting = setImmediate(count);
    };
    let counting = setImmediate(count);
    const parts = (await collect({ ...ask(query), max_tokens: 1 })).flat();
    clearImmediate(counting);
    expect(parts.at(-1)).toEqual({ type: 'finish', usage: { input_tokens, output_tokens: 1 } });
    expect(turns).toBeGreaterThanOrEqual(4);
  });

  it('a word without an end comes in pieces', async () => {
    const texts = textsOf(await collect(ask('x'.repeat(10_000))));
    expect(texts.map(({ length }) => length).filter((length) => length > 100)).toEqual([4096, 4096, 1808]);
  });

  it('an aborted answer goes no further and throws the reason', async () => {
    const abort = new AbortController();
    const reason = new Error('nobody wants it');
    const batches: ModelPart[][] = [];

    await expect(
      (async () => {
        for await (const batch of model.stream(ask('word '.repeat(1000)), abort.signal)) {
          batches.push(batch);
          abort.abort(reason);
        }
      })(),
    ).rejects.toBe(reason);
    expect(batches).toHaveLength(1);
    await expect(model.generate(ask('x'), abort.signal)).rejects.toBe(reason);
  });
});

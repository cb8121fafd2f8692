import { setImmediate as nextTurn } from 'node:timers/promises';
import { slicesOf } from '../json-text.js';
import type { Model, ModelMessage, ModelPart, ModelRequest } from './model-registry.js';
import type { ModelUsage } from './usage.js';

/** The name of the model that is always there. */
export const ECHO_MODEL = 'offline/echo';

/** Parts that are handed out before others get their turn of the event loop. */
const BATCH_SIZE = 64;

/** How much of the system prompt's first line is repeated, in characters. */
const MAX_PROMPT_LENGTH = 200;

/** Characters whose words are counted in one turn of the event loop. */
const COUNTED_AT_ONCE = 128 * 1024;

/**
 * A word with the white space after it; the matches together are the whole text. White space is never a surrogate. What is longer
 * than any word comes in pieces.
 */
const WORD = /\S{1,4096}\s{0,4096}|\s{1,4096}/gu;

/**
 * The built-in model `offline/echo`: it needs no key and no network, and says so. The same messages always get the same
 * answer: the first line of the system prompt, the number of earlier messages, and then, each of them verbatim, the
 * query and the outputs of earlier agents (the user messages at the end, of which the query is the first).
 *
 * Each word is a part of its own. Of the settings only `max_tokens` counts: the answer stops after that many parts.
 * The tokens of its usage are words: those of all messages, and the parts of the answer.
 */
export class EchoModel implements Model {
  async *stream(request: ModelRequest, signal: AbortSignal): AsyncGenerator<ModelPart[], void, void> {
    // Many calls may begin in one turn, each with all that the agents before it said.
    await nextTurn();
    signal.throwIfAborted();
    let output_tokens = 0;
    let batch: ModelPart[] = [];
    for (const text of words(request)) {
      if (batch.length === BATCH_SIZE) {
        yield batch;
        batch = [];
        await nextTurn();
        signal.throwIfAborted();
      }
      batch.push({ type: 'text', text });
      output_tokens++;
    }
    const input_tokens = await countWords(request.messages, signal);
    batch.push({ type: 'finish', usage: { input_tokens, output_tokens } });
    yield batch;
  }

  async generate(request: ModelRequest, signal: AbortSignal): Promise<{ text: string; usage: ModelUsage }> {
    let text = '';
    let usage: ModelUsage = { input_tokens: 0, output_tokens: 0 };
    for await (const parts of this.stream(request, signal)) {
      for (const part of parts) {
        if (part.type === 'text') text += part.text;
        else usage = part.usage;
      }
    }
    return { text, usage };
  }
}

/** The answer's words, `max_tokens` at most, found one at a time, so that a long text costs no long turn. */
function* words({ messages, max_tokens = Infinity }: ModelRequest): Generator<string, void, void> {
  let count = 0;
  for (const [word] of compose(messages).matchAll(WORD)) {
    if (++count > max_tokens) return;
    yield word;
  }
}

function compose(messages: ModelMessage[]): string {
  const prompt = messages[0]?.role === 'system' ? firstLine(messages[0].content) : '';
  const conversation = messages[0]?.role === 'system' ? messages.slice(1) : messages;
  const earlier = conversation.findLastIndex((message) => message.role !== 'user') + 1;
  const [query, ...outputs] = conversation.slice(earlier);
  return [
    'This is the built-in offline model: it repeats what it was given.',
    ...(prompt === '' ? [] : [`System prompt: ${prompt}`]),
    `Earlier messages: ${earlier}`,
    ...(query === undefined ? [] : [`Query: ${query.content}`]),
    ...outputs.map((output, index) => `Input ${index + 1}: ${output.content}`),
  ].join('\n');
}

function firstLine(text: string): string {
  const [line = ''] = text.trimStart().split(/[\r\n\u2028\u2029]/, 1);
  const characters = Array.from(line.slice(0, 2 * MAX_PROMPT_LENGTH + 2));
  return characters.length <= MAX_PROMPT_LENGTH
    ? line
    : `${characters.slice(0, MAX_PROMPT_LENGTH).join('')}…`;
}

async function countWords(messages: ModelMessage[], signal: AbortSignal): Promise<number> {
  let count = 0;
  let counted = 0;
  for (const { content } of messages) {
    let isInWord = false;
    for (const slice of slicesOf(content, COUNTED_AT_ONCE)) {
      if ((counted += slice.length) > COUNTED_AT_ONCE) {
        counted = slice.length;
        await nextTurn();
        signal.throwIfAborted();
      }
      for (const word of slice.matchAll(/\S+/g)) if (word.index > 0 || !isInWord) count++;
      isInWord = /\S/.test(slice.at(-1) ?? '');
    }
  }
  return count;
}

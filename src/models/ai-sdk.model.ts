import { InvalidResponseDataError } from '@ai-sdk/provider';
import type {
  LanguageModelV3,
  LanguageModelV3CallOptions,
  LanguageModelV3Message,
  LanguageModelV3StreamPart,
  LanguageModelV3Usage,
} from '@ai-sdk/provider';
import { OutputLimitError } from '../errors.js';
import { cutShort, toStreamError } from './model-error.js';
import type { Model, ModelMessage, ModelPart, ModelRequest } from './model-registry.js';
import { keptTokens } from './usage.js';
import type { ModelUsage } from './usage.js';
import { UpstreamCall } from './upstream-call.js';

/** How long a complete answer's connection may take to end by itself, so that it can be used again, ms. */
const LINGER_MS = 1000;

/**
 * A model of an AI SDK provider. It calls the provider's `doStream` and `doGenerate` themselves: `streamText` and
 * `generateText` would cost as much again per token, for tools and steps that a {@link Model} doesn't have.
 */
export class AiSdkModel implements Model {
  constructor(
    private readonly model: LanguageModelV3,
    private readonly options: {
      provider: string;
      timeoutMs: number;
      /** Characters of a streamed answer that are no part of its text (reasoning, calls of tools), at most. */
      mostUnsaid: number;
      /** As Anthropic: one system prompt, no system messages among the others, and no blank texts. */
      strict: boolean;
    },
  ) {}

  async *stream(request: ModelRequest, signal: AbortSignal): AsyncGenerator<ModelPart[], void, void> {
    const call = this.open(signal);
    let finished = false;
    let unsaid = 0;
    try {
      call.listen();
      const { stream } = await this.model.doStream(this.toCallOptions(request, call));
      call.heard();
      const reader = stream.getReader();
      while (!finished) {
        call.listen();
        const { done, value } = await reader.read();
        call.heard();
        if (done) throw cutShort(this.options.provider);
        const part = this.toPart(value);
        if (part === undefined) unsaid = this.countUnsaid(unsaid, value);
        if (part === undefined) continue;
        finished = part.type === 'finish';
        if (finished) release(reader, call);
        yield [part];
      }
    } catch (error) {
      throw call.toError(error);
    } finally {
      call.end(finished);
    }
  }

  async generate(request: ModelRequest, signal: AbortSignal): Promise<{ text: string; usage: ModelUsage }> {
    const call = this.open(signal);
    let finished = false;
    try {
      call.listen();
      const result = await this.model.doGenerate(this.toCallOptions(request, call));
      call.heard();
      finished = true;
      const text = result.content.map((part) => (part.type === 'text' ? part.text : '')).join('');
      return { text, usage: toUsage(result.usage) };
    } catch (error) {
      throw call.toError(error);
    } finally {
      call.end(finished);
    }
  }

  private open(signal: AbortSignal): UpstreamCall {
    return new UpstreamCall(this.options.provider, this.options.timeoutMs, signal);
  }

  private toCallOptions(request: ModelRequest, call: UpstreamCall): LanguageModelV3CallOptions {
    const messages = this.options.strict ? moveSystemFirst(request.messages) : request.messages;
    return {
      prompt: messages.map(toPromptMessage),
      temperature: request.temperature,
      maxOutputTokens: request.max_tokens,
      topP: request.top_p,
      frequencyPenalty: request.frequency_penalty,
      presencePenalty: request.presence_penalty,
      seed: request.seed,
      stopSequences: request.stop?.length ? request.stop : undefined,
      abortSignal: call.signal,
    };
  }

  /** The AI SDK keeps some of what no reader sees until the answer's end. */
  private countUnsaid(unsaid: number, part: LanguageModelV3StreamPart): number {
    const { provider, mostUnsaid } = this.options;
    const sum = unsaid + ('delta' in part ? part.delta.length : 0);
    if (sum <= mostUnsaid) return sum;
    throw new OutputLimitError(
      'provider',
      `The model provider "${provider}" sends more than ${mostUnsaid} characters beside its text.`,
    );
  }

  /** Text and the finish; whatever else a provider streams (metadata, reasoning, sources) is no content. */
  private toPart(part: LanguageModelV3StreamPart): ModelPart | undefined {
    const { provider } = this.options;
    if (part.type === 'text-delta') return part.delta === '' ? undefined : { type: 'text', text: part.delta };
    if (part.type === 'finish') {
      // Without a reason of the model's own the connection just ended, which not every provider takes for an error.
      if (part.finishReason.raw === undefined) throw cutShort(provider);
      return { type: 'finish', usage: toUsage(part.usage) };
    }
    if (part.type === 'error') {
      // This is how the others report the same.
      if (InvalidResponseDataError.isInstance(part.error)) throw cutShort(provider, part.error);
      throw toStreamError(part.error, provider);
    }
    return undefined;
  }
}

/** Lets a finished answer's connection end by itself; one that stays open for longer is closed. */
function release(reader: ReadableStreamDefaultReader<unknown>, call: UpstreamCall): void {
  const timer = setTimeout(call.close, LINGER_MS).unref();
  void reader
    .read()
    .then(({ done }) => (done ? undefined : call.close()), call.close)
    .finally(() => clearTimeout(timer));
}

/** All system messages as the one at the beginning, and no blank ones, which Anthropic refuses. */
function moveSystemFirst(messages: ModelMessage[]): ModelMessage[] {
  const written = messages.filter((message) => message.content.trim() !== '');
  const system = written.filter((message) => message.role === 'system').map((message) => message.content);
  const others = written.filter((message) => message.role !== 'system');
  return system.length === 0 ? others : [{ role: 'system', content: system.join('\n\n') }, ...others];
}

function toPromptMessage({ role, content }: ModelMessage): LanguageModelV3Message {
  return role === 'system' ? { role, content } : { role, content: [{ type: 'text', text: content }] };
}

function toUsage(usage: LanguageModelV3Usage): ModelUsage {
  const { inputTokens, outputTokens } = usage;
  return {
    input_tokens: keptTokens(inputTokens.total ?? 0),
    output_tokens: keptTokens(outputTokens.total ?? 0),
  };
}

import type { ModelUsage } from './usage.js';

/** One message of a conversation with a model. */
export interface ModelMessage {
  role: 'system' | 'user' | 'assistant';
  content: string;
}

/** Sampling parameters; what is left out is the provider's default. */
export interface ModelSettings {
  temperature?: number;
  max_tokens?: number;
  top_p?: number;
  frequency_penalty?: number;
  presence_penalty?: number;
  seed?: number;
  stop?: string[];
}

export interface ModelRequest extends ModelSettings {
  messages: ModelMessage[];
}

/** A piece of a streamed answer. `finish` comes once, last. */
export type ModelPart = { type: 'text'; text: string } | { type: 'finish'; usage: ModelUsage };

/**
 * A model that answers. Both calls end with the upstream's socket closed when `signal` aborts, and throw the signal's
 * reason then. Other failures are `TransientError` (may be repeated: 408, 409, 429, 5xx, network, silence) or
 * `AppError`, both with code `model_error`, `model_not_configured` or `timeout`; `retryAfter` is the upstream's, in s.
 */
export interface Model {
  /** Yields parts as they come, as many at a time as are there. */
  stream(request: ModelRequest, signal: AbortSignal): AsyncIterable<ModelPart[]>;
  generate(request: ModelRequest, signal: AbortSignal): Promise<{ text: string; usage: ModelUsage }>;
}

/** Finds models by `provider/model-id`. */
export abstract class ModelRegistry {
  /** Says what is wrong with a model's name, or nothing if its provider exists. Keys are not looked at. */
  abstract check(model: string): string | undefined;

  /** Throws `AppError` `model_not_configured` for an unknown provider or a missing API key. */
  abstract resolve(model: string): Model;
}

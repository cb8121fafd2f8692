import { z } from 'zod';
import { AppError, TransientError } from '../../errors.js';
import type { Model, ModelMessage, ModelRequest } from '../../models/model-registry.js';
import type { ModelUsage } from '../../models/usage.js';
import { settingSchemas } from '../definition.js';
import { compileTemplate } from '../templates.js';
import { toPointer } from '../validation.js';
import { agentKind, type AgentContext, type Source } from './agent.js';

/** What a model is asked with, in characters: more than any reads, and it is held and sent once for each agent. */
const MAX_PROMPT_CHARS = 5_000_000;
const DEFAULT_RETRIES = 2;
const FIRST_DELAY_MS = 200;
const LONGEST_DELAY_MS = 10_000;
/** An upstream that asks for a longer wait than this many seconds is not waited for: the client would not either. */
const LONGEST_RETRY_AFTER_S = 60;

const { temperature, max_tokens, top_p, stop, timeout } = settingSchemas;

const schema = z.strictObject({
  model: settingSchemas.model,
  system_prompt: z.string().optional(),
  temperature: temperature.optional(),
  max_tokens: max_tokens.optional(),
  top_p: top_p.optional(),
  frequency_penalty: z.number().min(-2).max(2).optional(),
  presence_penalty: z.number().min(-2).max(2).optional(),
  seed: z.int().optional(),
  stop: stop.optional(),
  streaming: z.boolean().default(true),
  timeout: timeout.optional(),
  max_retries: z.int().min(0).max(10).optional(),
});

type LlmConfig = z.output<typeof schema>;

/** One model call: what to ask, and how. */
interface Call {
  model: Model;
  request: ModelRequest;
  streaming: boolean;
  /** Seconds, of this one call. */
  timeout?: number;
  max_retries: number;
}

/** `llm`: asks a model with its system prompt, the chat history, the query and the outputs of its sources. */
export const llmAgent = agentKind(schema, function* (config, { pointer, models, faults }) {
  const problem = models.check(config.model);
  if (problem !== undefined) faults.push({ pointer: toPointer(pointer, 'model'), detail: problem });
  const prompt = yield* compileTemplate(config.system_prompt ?? '', {
    pointer: toPointer(pointer, 'system_prompt'),
    faults,
  });
  return (
    prompt && {
      async run(context) {
        const { text: systemPrompt, letGo } = await prompt.render(context);
        letGo(); // nobody waits for room while it holds some: all might
        return answerWith(config, systemPrompt, context);
      },
    }
  );
});

async function answerWith(
  config: LlmConfig,
  systemPrompt: string,
  context: AgentContext,
): Promise<ModelUsage> {
  const { evaluations } = context;
  // Many may begin at the same moment, each with all that the agents before it said.
  const letGo = await evaluations.take(refuseLongPrompt(systemPrompt, context));
  try {
    await evaluations.turn();
    return await answer(prepare(config, systemPrompt, context), context);
  } finally {
    letGo();
  }
}

/** @returns its length */
function refuseLongPrompt(systemPrompt: string, { chat_history, query, sources }: AgentContext): number {
  const texts = [systemPrompt, query, ...sources.map(({ output }) => output ?? '')];
  const said = [...texts, ...chat_history.map(({ content }) => content)];
  const length = said.reduce((sum, text) => sum + text.length, 0);
  if (length <= MAX_PROMPT_CHARS) return length;
  throw new AppError(
    'agent_error',
    `The prompt of the agent, with the query, the history and the outputs of those before it, has ${length} characters, and may have ${MAX_PROMPT_CHARS}.`,
  );
}

function prepare(config: LlmConfig, systemPrompt: string, context: AgentContext): Call {
  const { overrides } = context;
  return {
    model: context.models.resolve(overrides.model ?? config.model),
    request: {
      messages: toMessages(systemPrompt, context),
      temperature: overrides.temperature ?? config.temperature,
      max_tokens: overrides.max_tokens ?? config.max_tokens,
      top_p: overrides.top_p ?? config.top_p,
      frequency_penalty: config.frequency_penalty,
      presence_penalty: config.presence_penalty,
      seed: config.seed,
      stop: overrides.stop ?? config.stop,
    },
    streaming: config.streaming,
    timeout: overrides.timeout ?? config.timeout,
    max_retries: config.max_retries ?? context.max_retries ?? DEFAULT_RETRIES,
  };
}

function toMessages(systemPrompt: string, context: AgentContext): ModelMessage[] {
  const system: ModelMessage[] = systemPrompt === '' ? [] : [{ role: 'system', content: systemPrompt }];
  return [
    ...system,
    ...context.chat_history.map(({ actor, content }): ModelMessage => ({ role: actor, content })),
    { role: 'user', content: context.query },
    ...context.sources.map((source): ModelMessage => ({ role: 'user', content: describeSource(source) })),
  ];
}

function describeSource({ agent_id, name, output, error }: Source): string {
  const who = name ?? agent_id;
  return error === undefined ? `Output of ${who}:\n${output ?? ''}` : `${who} failed: ${error.message}`;
}

/**
 * Repeats a call that failed with a `TransientError` before its first text: a part of an answer that was spoken can't
 * be taken back. Waits longer each time, at random, so that many clients of a busy model don't come back at once.
 */
async function answer(call: Call, context: AgentContext): Promise<ModelUsage> {
  for (let attempt = 0; ; attempt += 1) {
    const progress = { spoken: false };
    try {
      return await withTimeout(call, context, (signal) => callModel(call, context, { signal, progress }));
    } catch (error) {
      const transient = asTransient(error);
      if (transient === undefined) throw error;
      const { retryAfter = 0 } = transient;
      if (progress.spoken || attempt >= call.max_retries || retryAfter > LONGEST_RETRY_AFTER_S)
        throw transient;
      context.report(transient);
      const backoff = Math.min(FIRST_DELAY_MS * 2 ** attempt, LONGEST_DELAY_MS) * (0.5 + Math.random() / 2);
      await wait(Math.max(backoff, retryAfter * 1000), context.signal);
    }
  }
}

async function callModel(
  { model, request, streaming }: Call,
  context: AgentContext,
  { signal, progress }: { signal: AbortSignal; progress: { spoken: boolean } },
): Promise<ModelUsage> {
  let usage: ModelUsage = { input_tokens: 0, output_tokens: 0 };
  const speak = (text: string) => {
    if (text === '') return undefined;
    progress.spoken = true;
    return context.emit(text);
  };
  if (!streaming) {
    const generated = await model.generate(request, signal);
    await speak(generated.text);
    return generated.usage;
  }
  for await (const parts of model.stream(request, signal)) {
    for (const part of parts) {
      if (part.type === 'finish') {
        usage = part.usage;
      } else {
        // Awaiting only where there is something to wait for saves a turn of the microtask queue for each token.
        const room = speak(part.text);
        if (room !== undefined) await room;
      }
    }
  }
  return usage;
}

/** Gives `run` a signal that aborts with the context's or after `call.timeout`; the latter becomes `AppError` `timeout`. */
async function withTimeout<Result>(
  { timeout: seconds }: Call,
  { signal, agent_id }: AgentContext,
  run: (signal: AbortSignal) => Promise<Result>,
): Promise<Result> {
  if (seconds === undefined) return run(signal);
  let expired = false;
  const controller = new AbortController();
  const abort = () => controller.abort();
  const timer = setTimeout(() => {
    expired = true;
    abort();
  }, seconds * 1000);
  signal.addEventListener('abort', abort, { once: true });
  if (signal.aborted) abort();
  try {
    return await run(controller.signal);
  } catch (error) {
    if (!expired || signal.aborted) throw error;
    throw new AppError('timeout', `The model did not answer agent "${agent_id}" within its ${seconds} s.`, {
      cause: error,
    });
  } finally {
    clearTimeout(timer);
    signal.removeEventListener('abort', abort);
  }
}

/** A connection that the upstream closed while it was idle is found out only by using it; a new one will do. */
function asTransient(error: unknown): TransientError | undefined {
  if (error instanceof TransientError) return error;
  if (error instanceof AppError || !isConnectionReset(error)) return undefined;
  return new TransientError('model_error', 'The connection to the model was lost.', { cause: error });
}

function isConnectionReset(error: unknown): boolean {
  if (typeof error !== 'object' || error === null) return false;
  if ('code' in error && error.code === 'ECONNRESET') return true;
  return 'cause' in error && error.cause !== error && isConnectionReset(error.cause);
}

function wait(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const end = () => {
      clearTimeout(timer);
      signal.removeEventListener('abort', end);
      if (signal.aborted) reject(signal.reason as Error);
      else resolve();
    };
    const timer = setTimeout(end, ms);
    signal.addEventListener('abort', end, { once: true });
    if (signal.aborted) end();
  });
}

import { createAnthropic } from '@ai-sdk/anthropic';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import type { LanguageModelV3 } from '@ai-sdk/provider';
import { Agent } from 'undici';
import type { Config, ModelProviderConfig } from '../config.js';
import { AppError } from '../errors.js';
import { AiSdkModel } from './ai-sdk.model.js';
import { ECHO_MODEL, EchoModel } from './echo.model.js';
import { ModelRegistry } from './model-registry.js';
import type { Model } from './model-registry.js';
import { createUpstreamFetch } from './upstream-fetch.js';

/** Clients choose model ids, so neither their number nor their length may grow what is kept of them without bound. */
const MAX_KEPT_MODELS = 200;
const MAX_NAME_LENGTH = 300;

/** Of a provider's answer so many bytes are kept for each that an agent may say, as it may escape more, and for what is beside them. */
const MOST_ESCAPING = 3;
const BYTES_BESIDE = 1024 * 1024;

/** The documented defaults, spelled out, because the AI SDK would look into the environment for others. */
const DEFAULT_URLS = { openai: 'https://api.openai.com/v1', anthropic: 'https://api.anthropic.com/v1' };

/** Where the key is when `api_key_env` doesn't say it; an openai-compatible server may do without one. */
const DEFAULT_KEY_VARIABLES: Record<ModelProviderConfig['type'], string | undefined> = {
  openai: 'OPENAI_API_KEY',
  anthropic: 'ANTHROPIC_API_KEY',
  'openai-compatible': undefined,
};

interface ModelName {
  provider: string;
  /** May hold slashes itself. */
  modelId: string;
}

const BUILT_IN = splitName(ECHO_MODEL);

/** The built-in model and those of the configured providers (`MODEL_PROVIDERS`), reached through the AI SDK. */
export class AiSdkModelRegistry extends ModelRegistry {
  private readonly echo = new EchoModel();
  private readonly providers: ReadonlyMap<string, ModelProviderConfig>;
  /** In the order of their last use. They are kept because the AI SDK builds the schemas of the answers for each anew. */
  private readonly models = new Map<string, { apiKey: string | undefined; model: Model }>();
  private readonly connections = new Agent({ headersTimeout: 0, bodyTimeout: 0 });
  private readonly fetch: typeof fetch;

  constructor(private readonly config: Pick<Config, 'MODEL_PROVIDERS' | 'MAX_AGENT_OUTPUT' | 'secret'>) {
    super();
    this.fetch = createUpstreamFetch(
      this.connections,
      config.MAX_AGENT_OUTPUT * MOST_ESCAPING + BYTES_BESIDE,
    );
    this.providers = new Map(Object.entries(config.MODEL_PROVIDERS));
  }

  check(model: string): string | undefined {
    if (model.length > MAX_NAME_LENGTH) return `A model's name has ${MAX_NAME_LENGTH} characters at most.`;
    const { provider, modelId } = splitName(model);
    if (provider === '' || modelId === '') {
      return `"${model}" is not a model's name. It must be provider/model-id, for example ${ECHO_MODEL}.`;
    }
    if (model === ECHO_MODEL || this.providers.has(provider)) return undefined;
    if (provider === BUILT_IN.provider)
      return `There is no model "${model}". The built-in one is ${ECHO_MODEL}.`;
    const known = [BUILT_IN.provider, ...this.providers.keys()].join(', ');
    return `The provider "${provider}" of the model "${model}" is not configured. Known providers: ${known}.`;
  }

  resolve(model: string): Model {
    const fault = this.check(model);
    if (fault !== undefined) throw new AppError('model_not_configured', fault);
    const name = splitName(model);
    const settings = this.providers.get(name.provider);
    if (settings === undefined) return this.echo;

    const apiKey = this.readKey(name.provider, settings);
    const kept = this.models.get(model);
    if (kept?.apiKey === apiKey && kept !== undefined) {
      this.keep(model, kept);
      return kept.model;
    }
    const made = this.create(name, settings, apiKey);
    this.keep(model, { apiKey, model: made });
    return made;
  }

  /** Closes the connections to all upstreams, also those that still carry an answer. */
  async close(): Promise<void> {
    await this.connections.destroy();
  }

  /** Read for every call, so that a key that was set or changed later is used. */
  private readKey(provider: string, settings: ModelProviderConfig): string | undefined {
    const variable = settings.api_key_env ?? DEFAULT_KEY_VARIABLES[settings.type];
    if (variable === undefined) return undefined;
    const key = this.config.secret(variable)?.trim();
    if (!key) {
      throw new AppError(
        'model_not_configured',
        `The model provider "${provider}" has no API key: set the environment variable ${variable}.`,
      );
    }
    // What can't stand in a header would be quoted, key and all, by the error that it causes there.
    if (!/^[\x21-\x7e]+$/.test(key)) {
      throw new AppError(
        'model_not_configured',
        `The environment variable ${variable} of the model provider "${provider}" holds something that is not an API key.`,
      );
    }
    return key;
  }

  private create(name: ModelName, settings: ModelProviderConfig, apiKey: string | undefined): Model {
    return new AiSdkModel(this.createLanguageModel(name, settings, apiKey), {
      provider: name.provider,
      timeoutMs: settings.timeout_ms,
      mostUnsaid: this.config.MAX_AGENT_OUTPUT,
      strict: settings.type === 'anthropic',
    });
  }

  private createLanguageModel(
    { provider, modelId }: ModelName,
    settings: ModelProviderConfig,
    apiKey: string | undefined,
  ): LanguageModelV3 {
    const { fetch } = this;
    switch (settings.type) {
      case 'anthropic':
        return createAnthropic({ baseURL: settings.base_url ?? DEFAULT_URLS.anthropic, apiKey, fetch })(
          modelId,
        );
      case 'openai':
        // Chat Completions: the Responses API knows no stop, seed or penalties, and keeps what it is sent.
        return createOpenAI({ baseURL: settings.base_url ?? DEFAULT_URLS.openai, apiKey, fetch }).chat(
          modelId,
        );
      case 'openai-compatible':
        return createOpenAICompatible({
          name: provider,
          baseURL: settings.base_url ?? '',
          apiKey,
          includeUsage: true,
          fetch,
        }).chatModel(modelId);
    }
  }

  private keep(name: string, entry: { apiKey: string | undefined; model: Model }): void {
    this.models.delete(name);
    this.models.set(name, entry);
    if (this.models.size <= MAX_KEPT_MODELS) return;
    const [leastUsed] = this.models.keys();
    if (leastUsed !== undefined) this.models.delete(leastUsed);
  }
}

function splitName(name: string): ModelName {
  const slash = name.indexOf('/');
  return slash === -1
    ? { provider: '', modelId: '' }
    : { provider: name.slice(0, slash), modelId: name.slice(slash + 1) };
}

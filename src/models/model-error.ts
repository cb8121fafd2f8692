import { APICallError } from '@ai-sdk/provider';
import { AppError, OutputLimitError, TransientError } from '../errors.js';

const UNREACHABLE_CODES = new Set([
  'ECONNREFUSED',
  'ENOTFOUND',
  'EAI_AGAIN',
  'EHOSTUNREACH',
  'ENETUNREACH',
  'ETIMEDOUT',
  'UND_ERR_CONNECT_TIMEOUT',
]);

const BROKEN_CODES = new Set([
  'ECONNRESET',
  'ECONNABORTED',
  'EPIPE',
  'ERR_STREAM_PREMATURE_CLOSE',
  'UND_ERR_SOCKET',
  'UND_ERR_ABORTED',
  'UND_ERR_CLOSED',
  'UND_ERR_DESTROYED',
  'UND_ERR_RES_CONTENT_LENGTH_MISMATCH',
]);

/** What a failed status suggests to do; a provider's own text could hold a key or somebody's words. */
const STATUS_REMEDIES: Record<number, string> = {
  401: ' Check its API key.',
  403: ' Check its API key and what that may use.',
  404: " Check the model's name and the provider's base_url.",
  413: ' The messages are too long for it.',
  429: ' It takes no more requests for now.',
};

/** Error types of the providers that another try can't help, as they come in the middle of a stream. */
const LASTING_ERROR = /invalid|authentication|permission|not_found|quota|billing|too_large|content_filter/;

/**
 * What a call of a model provider failed with, as an error that clients may see: a {@link TransientError} for 408, 409,
 * 429, 5xx and the network, else an {@link AppError}. The original is the `cause`; it holds the upstream's body and the
 * request's messages.
 */
export function toModelError(error: unknown, provider: string): AppError {
  if (error instanceof AppError) return error;
  const refused = [...causesOf(error)].find((cause) => cause instanceof OutputLimitError);
  if (refused !== undefined) return refused;
  const code = findNetworkCode(error);
  if (code !== undefined) return networkError(code, provider, error);
  if (APICallError.isInstance(error) && error.statusCode !== undefined && !isSuccess(error.statusCode)) {
    return statusError(error.statusCode, provider, error);
  }
  return new AppError(
    'model_error',
    `The model provider "${provider}" sent something that is not a valid answer.`,
    { cause: error },
  );
}

/** The same for an error that the provider reports inside of a stream that had begun well. */
export function toStreamError(error: unknown, provider: string): AppError {
  if (error instanceof Error) return toModelError(error, provider);
  const message = `The model provider "${provider}" reported an error in the middle of its answer.`;
  return isLasting(error)
    ? new AppError('model_error', message, { cause: error })
    : new TransientError('model_error', message, { cause: error });
}

/** The answer stopped without an end: somebody on the way closed the connection in an orderly fashion. */
export function cutShort(provider: string, cause?: unknown): AppError {
  return new TransientError(
    'model_error',
    `The answer of the model provider "${provider}" ended before it was complete.`,
    { cause },
  );
}

function networkError(code: string, provider: string, cause: unknown): AppError {
  const message = UNREACHABLE_CODES.has(code)
    ? `The model provider "${provider}" can't be reached (${code}). Check that it runs and that its base_url is right.`
    : `The connection to the model provider "${provider}" broke (${code}).`;
  return new TransientError('model_error', message, { cause });
}

function statusError(status: number, provider: string, cause: APICallError): AppError {
  const remedy = isRedirect(status)
    ? ' Redirects are not followed: set its base_url to the final address.'
    : (STATUS_REMEDIES[status] ?? '');
  const message = `The model provider "${provider}" answered ${status}.${remedy}`;
  if (!isTransientStatus(status)) return new AppError('model_error', message, { cause });
  return new TransientError('model_error', message, {
    retryAfter: readRetryAfter(cause.responseHeaders),
    cause,
  });
}

function isSuccess(status: number): boolean {
  return status >= 200 && status < 300;
}

function isRedirect(status: number): boolean {
  return status >= 300 && status < 400;
}

function isTransientStatus(status: number): boolean {
  return status === 408 || status === 409 || status === 429 || status >= 500;
}

/** `type` and `code` of the providers' error objects: words, or the status that the error would have had. */
function isLasting(error: unknown): boolean {
  if (typeof error !== 'object' || error === null) return false;
  const { type, code }: { type?: unknown; code?: unknown } = error;
  return [type, code].some((value) => {
    const status = Number(value);
    if (status >= 400 && status < 600) return !isTransientStatus(status);
    return typeof value === 'string' && LASTING_ERROR.test(value);
  });
}

/** The code of a system or socket error, wherever in the chain of causes it is. */
function findNetworkCode(error: unknown): string | undefined {
  for (const cause of causesOf(error)) {
    const { code }: { code?: unknown } = cause;
    if (typeof code === 'string' && (UNREACHABLE_CODES.has(code) || BROKEN_CODES.has(code))) return code;
  }
  return undefined;
}

/** An error, what caused it, and so on. */
function causesOf(error: unknown): Set<object> {
  const causes = new Set<object>();
  let current = error;
  while (typeof current === 'object' && current !== null && !causes.has(current)) {
    causes.add(current);
    const { cause }: { cause?: unknown } = current;
    current = cause;
  }
  return causes;
}

/** Whole seconds from `retry-after-ms` or `Retry-After` (RFC 9110: seconds or an HTTP date). */
function readRetryAfter(headers: Record<string, string> = {}): number | undefined {
  const after = headers['retry-after'] || 'none';
  const seconds = [
    Number(headers['retry-after-ms'] || 'none') / 1000,
    Number(after),
    (Date.parse(after) - Date.now()) / 1000,
  ].find(Number.isFinite);
  return seconds === undefined ? undefined : Math.max(0, Math.ceil(seconds));
}

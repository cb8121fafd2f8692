/** One fault of a request: where it is (RFC 6901 JSON pointer into the body or the query parameters) and what is wrong. */
export interface Fault {
  pointer: string;
  detail: string;
}

/** A hostile request can have a fault in every few bytes; a client is told so many of them. */
const MOST_FAULTS = 100;
/** Texts for clients repeat what clients sent, which can be as long as a body; so many characters of them are told. */
const MOST_POINTER_CHARACTERS = 1000;
const MOST_DETAIL_CHARACTERS = 1000;
const MOST_MESSAGE_CHARACTERS = 4000;

/** Every code a client can meet: in a problem document (HTTP status) or in a terminal `error` chunk. Codes never change. */
export const ERROR_CODES = {
  invalid_json: { status: 400, title: 'The body is not valid JSON' },
  validation_failed: { status: 400, title: 'The request is not valid' },
  override_not_allowed: { status: 400, title: 'This runtime override is not allowed' },
  invalid_cursor: { status: 400, title: 'The position in the stream is not valid' },
  bad_request: { status: 400, title: 'The request is not valid HTTP' },
  idempotency_key_invalid: { status: 400, title: 'The Idempotency-Key is not valid' },
  origin_not_allowed: { status: 403, title: 'Pages of this origin may not connect' },
  not_found: { status: 404, title: 'There is nothing at this address' },
  workflow_not_found: { status: 404, title: 'The workflow does not exist' },
  deployment_not_found: { status: 404, title: 'The deployment is not available' },
  execution_not_found: { status: 404, title: 'The execution does not exist' },
  batch_not_found: { status: 404, title: 'The batch does not exist' },
  request_timeout: { status: 408, title: 'The request did not arrive in time' },
  workflow_exists: { status: 409, title: 'A workflow with this name and version exists' },
  workflow_in_use: { status: 409, title: 'The workflow has an active deployment' },
  workflow_inactive: { status: 409, title: 'The workflow is not active' },
  deployment_exists: { status: 409, title: 'An active deployment has this name' },
  execution_finished: { status: 409, title: 'The execution has already ended' },
  batch_finished: { status: 409, title: 'The batch has already ended' },
  already_subscribed: { status: 409, title: 'This WebSocket follows that stream already' },
  log_expired: { status: 410, title: 'The chunks of this stream were removed by retention' },
  payload_too_large: { status: 413, title: 'The body is too large' },
  unsupported_media_type: { status: 415, title: 'The body must be application/json' },
  idempotency_key_reused: { status: 422, title: 'The Idempotency-Key was used for another request' },
  workflow_invalid: { status: 422, title: 'The workflow definition is not valid' },
  headers_too_large: { status: 431, title: 'The head of the request is too large' },
  queue_full: { status: 429, title: 'Too many executions wait' },
  too_many_requests: { status: 429, title: 'Too many requests that read much wait' },
  too_many_subscriptions: { status: 429, title: 'This WebSocket follows too many streams' },
  internal_error: { status: 500, title: 'Something went wrong in the server' },
  agent_error: { status: 502, title: 'An agent could not produce its output' },
  evaluation_limit: { status: 502, title: 'The templates and conditions took too long together' },
  output_too_large: { status: 502, title: 'The output is larger than it may be' },
  model_error: { status: 502, title: 'The model could not answer' },
  model_not_configured: { status: 502, title: 'The model is not configured on this server' },
  unavailable: { status: 503, title: 'The server cannot take this request now' },
  worker_lost: { status: 502, title: 'The workers that ran this execution died again and again' },
  timeout: { status: 504, title: 'The time limit was reached' },
  cancelled: { status: 409, title: 'The execution was cancelled' },
} as const satisfies Record<string, { status: number; title: string }>;

export type ErrorCode = keyof typeof ERROR_CODES;

/** A stored code; one that this version does not know reads as `internal_error`. */
export function toErrorCode(code: string): ErrorCode {
  return Object.hasOwn(ERROR_CODES, code) ? (code as ErrorCode) : 'internal_error';
}

/**
 * The one error that services and the engine throw. `message` is shown to clients, so it never carries a stack
 * trace, a key or an upstream's body; those go into `cause`, which is only logged. Of many faults the first are kept, and
 * long texts are cut.
 */
export class AppError extends Error {
  readonly faults: Fault[] | undefined;
  /** Seconds after which a repeat may succeed (RFC 9110 `Retry-After`). */
  readonly retryAfter: number | undefined;

  constructor(
    readonly code: ErrorCode,
    message: string,
    options: { faults?: Fault[]; retryAfter?: number; cause?: unknown } = {},
  ) {
    super(cut(message, MOST_MESSAGE_CHARACTERS), { cause: options.cause });
    this.name = new.target.name;
    this.faults = options.faults?.slice(0, MOST_FAULTS).map(({ pointer, detail }) => ({
      pointer: cut(pointer, MOST_POINTER_CHARACTERS),
      detail: cut(detail, MOST_DETAIL_CHARACTERS),
    }));
    this.retryAfter = options.retryAfter;
  }

  get status(): number {
    return ERROR_CODES[this.code].status;
  }
}

function cut(text: string, most: number): string {
  return text.length > most ? `${text.slice(0, most)}…` : text;
}

/** A failure that may not happen again: the same call can be repeated as long as none of its output was used. */
export class TransientError extends AppError {}

/** Whose output is bounded: one agent's, that of all agents of an execution, or what a provider sends for one call. */
export type OutputLimit = 'agent' | 'execution' | 'provider';

/** Something said more than it may. The same call would say as much again. */
export class OutputLimitError extends AppError {
  constructor(
    readonly limit: OutputLimit,
    message: string,
  ) {
    super('output_too_large', message);
  }
}

/** Any thrown value as an AppError; what is not one already becomes `internal_error`, its text kept from clients. */
export function toAppError(error: unknown): AppError {
  if (error instanceof AppError) return error;
  return new AppError(
    'internal_error',
    'The server met an error that it did not expect; its log has the details.',
    {
      cause: error,
    },
  );
}

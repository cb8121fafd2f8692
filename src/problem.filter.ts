import { Catch, HttpException, Logger } from '@nestjs/common';
import type { ArgumentsHost, ExceptionFilter } from '@nestjs/common';
import type { Request, Response } from 'express';
import { isUnavailable } from './database/unavailable.js';
import { AppError, ERROR_CODES, toAppError } from './errors.js';
import type { ErrorCode } from './errors.js';
import type { ProblemDto } from './problem.dto.js';

/** Answers every error that a route throws before its answer began as `application/problem+json` (RFC 9457). */
@Catch()
export class ProblemFilter implements ExceptionFilter {
  private readonly logger = new Logger(ProblemFilter.name);

  catch(thrown: unknown, host: ArgumentsHost): void {
    const http = host.switchToHttp();
    const request = http.getRequest<Request & { id: string }>();
    const response = http.getResponse<Response>();
    const error = translate(thrown);
    logFailure(this.logger, error, { request_id: request.id });
    // The answer has begun, so nothing can be said any more: a stream says its errors in a chunk.
    if (response.headersSent) return;
    if (error.retryAfter !== undefined) response.setHeader('Retry-After', Math.ceil(error.retryAfter));
    response.status(error.status).type('application/problem+json').send(problemOf(error, request));
  }
}

/** Logs an error that is the server's own fault; the others are only their caller's business. */
export function logFailure(logger: Logger, error: AppError, request: { request_id: string }): void {
  if (error.status < 500) return;
  logger[error.code === 'internal_error' ? 'error' : 'warn']({ ...request, err: error.cause ?? error });
}

/** An error as its caller sees it. */
export function problemOf(error: AppError, request: { id: string; path: string }): ProblemDto {
  return {
    type: `urn:agent-studio:problem:${error.code}`,
    title: ERROR_CODES[error.code].title,
    status: error.status,
    detail: error.message,
    instance: request.path,
    code: error.code,
    request_id: request.id,
    errors: error.faults,
  };
}

/** What the framework, the body parser and the database throw, in the terms of this API. */
export function translate(thrown: unknown): AppError {
  if (thrown instanceof AppError) return thrown;
  if (isUnavailable(thrown)) {
    return new AppError('unavailable', 'The database can not be reached. Try again in a moment.', {
      retryAfter: 1,
      cause: thrown,
    });
  }
  const status = statusOf(thrown);
  if (thrown instanceof Error && status === 503) {
    return new AppError('unavailable', thrown.message, { retryAfter: 1, cause: thrown });
  }
  if (thrown instanceof Error && status !== undefined && status < 500) {
    // Nest makes the same exception of a body that is not JSON and of an address with a broken percent-encoding.
    const code = thrown.message.startsWith('Failed to decode param') ? undefined : CODES_BY_STATUS[status];
    return new AppError(code ?? 'validation_failed', thrown.message, { cause: thrown });
  }
  return toAppError(thrown);
}

const CODES_BY_STATUS: Record<number, ErrorCode> = {
  400: 'invalid_json',
  404: 'not_found',
  413: 'payload_too_large',
  415: 'unsupported_media_type',
};

function statusOf(thrown: unknown): number | undefined {
  if (thrown instanceof HttpException) return thrown.getStatus();
  // The body parser's errors (http-errors) carry their status.
  if (thrown instanceof Error && 'status' in thrown && typeof thrown.status === 'number')
    return thrown.status;
  return undefined;
}

import type { IncomingMessage, ServerResponse } from 'node:http';
import type { LoggerService } from '@nestjs/common';
import { destination, pino, stdTimeFunctions } from 'pino';
import type { Logger } from 'pino';
import { pinoHttp } from 'pino-http';
import { v4 as uuidv4 } from 'uuid';
import type { Config } from './config.js';

/** What a client may call its request. */
export const REQUEST_ID = /^[\w.:-]{1,100}$/;
/** Asked for every few seconds by machines. */
const QUIET_PATHS = /^\/(health|metrics)/;

/** Nest's log calls as JSON lines. An object as the first argument gives the line's fields, a text its `msg`. */
export class JsonLogger implements LoggerService {
  readonly pino: Logger;

  constructor(level: Config['LOG_LEVEL']) {
    const options = { level, base: null, timestamp: stdTimeFunctions.isoTime };
    // Synchronous, so that the last lines before a crash are not lost.
    this.pino = pino(options, destination({ dest: 1, sync: true }));
  }

  log = (message: unknown, ...rest: unknown[]) => this.write('info', message, rest);
  fatal = (message: unknown, ...rest: unknown[]) => this.write('fatal', message, rest);
  error = (message: unknown, ...rest: unknown[]) => this.write('error', message, rest);
  warn = (message: unknown, ...rest: unknown[]) => this.write('warn', message, rest);
  debug = (message: unknown, ...rest: unknown[]) => this.write('debug', message, rest);
  verbose = (message: unknown, ...rest: unknown[]) => this.write('trace', message, rest);

  /** Nest's Logger adds the context as the last argument. */
  private write(
    level: 'fatal' | 'error' | 'warn' | 'info' | 'debug' | 'trace',
    message: unknown,
    rest: unknown[],
  ): void {
    const context = rest.at(-1);
    const texts = rest.slice(0, -1).filter((part) => typeof part === 'string');
    if (message instanceof Error) this.pino[level]({ context, err: message }, texts[0] ?? message.message);
    else if (typeof message === 'object') this.pino[level]({ context, ...message }, texts[0]);
    else this.pino[level]({ context, stack: texts[0] }, String(message));
  }
}

/** One line for each answered request, with its id and, where it was about one, its execution's. */
export function requestLog(logger: Logger) {
  return pinoHttp<IncomingMessage, ServerResponse>({
    logger,
    genReqId: (request, response) => {
      const given = request.headers['x-request-id'];
      const id = typeof given === 'string' && REQUEST_ID.test(given) ? given : uuidv4();
      response.setHeader('X-Request-Id', id);
      return id;
    },
    autoLogging: { ignore: (request) => QUIET_PATHS.test(request.url ?? '') },
    quietReqLogger: true,
    customAttributeKeys: { reqId: 'request_id' },
    serializers: {
      // No headers and no query string: they can hold keys and contents.
      req: (request: { method: string; url: string }) => ({
        method: request.method,
        path: request.url.split('?')[0],
      }),
      res: (response: { statusCode: number }) => ({ status: response.statusCode }),
    },
    customProps: (_request, response) => ({ execution_id: executionIdOf(response) }),
    customLogLevel: (_request, response, error) => (error || response.statusCode >= 500 ? 'warn' : 'info'),
  });
}

function executionIdOf(response: ServerResponse): string | undefined {
  const location = response.getHeader('Content-Location');
  return typeof location === 'string' ? location.split('/').at(-1) : undefined;
}

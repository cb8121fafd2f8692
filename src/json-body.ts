import type { NestExpressApplication } from '@nestjs/platform-express';
import type { NextFunction, Request, Response } from 'express';
import type { Config } from './config.js';
import { AppError } from './errors.js';

/** Members of one object: what checks it later takes a time that grows with their square. */
const MOST_MEMBERS = 2000;
/** Keys that could reach an object's prototype once the object is merged or copied (CWE-1321). */
const FORBIDDEN_KEYS = new Set(['__proto__', 'constructor', 'prototype']);

/**
 * Reads JSON bodies: `payload_too_large` beyond `MAX_BODY_BYTES`, `unsupported_media_type` for anything but JSON,
 * `validation_failed` for nesting deeper than `MAX_JSON_DEPTH`, an object with very many members, or a key that could pollute
 * a prototype.
 */
export function useJsonBody(
  app: NestExpressApplication,
  config: Pick<Config, 'MAX_BODY_BYTES' | 'MAX_JSON_DEPTH'>,
): void {
  app.use(requireJson);
  app.useBodyParser('json', { limit: config.MAX_BODY_BYTES, strict: false });
  app.use((request: Request, _response: Response, next: NextFunction) => {
    checkJson(request.body, config.MAX_JSON_DEPTH);
    next();
  });
}

function requireJson(request: Request, _response: Response, next: NextFunction): void {
  const hasBody =
    request.headers['transfer-encoding'] !== undefined || Number(request.headers['content-length']) > 0;
  if (hasBody && !request.is('json')) {
    throw new AppError(
      'unsupported_media_type',
      'Send the body as JSON, with the header Content-Type: application/json.',
    );
  }
  next();
}

/**
 * Throws `validation_failed` for nesting deeper than `maxDepth` or a key that could pollute a prototype. Walks without
 * recursion, because what JSON.parse can nest would overflow the stack of a recursive walk.
 */
export function checkJson(body: unknown, maxDepth: number): void {
  const open: { value: unknown; pointer: string; depth: number }[] = [{ value: body, pointer: '', depth: 0 }];
  for (let node = open.pop(); node; node = open.pop()) {
    const { value, pointer, depth } = node;
    if (typeof value !== 'object' || value === null) continue;
    if (depth === maxDepth) refuse(pointer, `is nested deeper than ${maxDepth} levels`);
    const members = Object.entries(value);
    if (!Array.isArray(value) && members.length > MOST_MEMBERS) {
      refuse(pointer, `has more than ${MOST_MEMBERS} members`);
    }
    for (const [key, child] of members) {
      const at = `${pointer}/${key.replaceAll('~', '~0').replaceAll('/', '~1')}`;
      if (!Array.isArray(value) && FORBIDDEN_KEYS.has(key)) refuse(at, 'is not an allowed name');
      if (typeof child === 'object') open.push({ value: child, pointer: at, depth: depth + 1 });
    }
  }
}

function refuse(pointer: string, detail: string): never {
  throw new AppError('validation_failed', `The body is not valid: ${pointer} ${detail}.`, {
    faults: [{ pointer, detail }],
  });
}

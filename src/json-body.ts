import type { NestExpressApplication } from '@nestjs/platform-express';
import type { NextFunction, Request, Response } from 'express';
import type { Config } from './config.js';
import { AppError } from './errors.js';

/** Members of one object: what checks it later takes a time that grows with their square. */
const MOST_MEMBERS = 2000;
/** Keys that could reach an object's prototype once the object is merged or copied (CWE-1321). */
const FORBIDDEN_KEYS = new Set(['__proto__', 'constructor', 'prototype']);

/** What a JSON document may hold. */
export interface JsonLimits {
  maxDepth: number;
  /** Members and elements, of all objects and lists together. */
  maxValues: number;
}

/**
 * Reads JSON bodies: `payload_too_large` beyond `MAX_BODY_BYTES`, `unsupported_media_type` for anything but JSON, and what
 * {@link checkJson} refuses.
 */
export function useJsonBody(
  app: NestExpressApplication,
  config: Pick<Config, 'MAX_BODY_BYTES' | 'MAX_JSON_DEPTH' | 'MAX_JSON_VALUES'>,
): void {
  const limits = jsonLimits(config);
  app.use(requireJson);
  app.useBodyParser('json', { limit: config.MAX_BODY_BYTES, strict: false });
  app.use((request: Request, _response: Response, next: NextFunction) => {
    checkJson(request.body, limits);
    next();
  });
}

/** The limits of a document that a client sends. */
export function jsonLimits(config: Pick<Config, 'MAX_JSON_DEPTH' | 'MAX_JSON_VALUES'>): JsonLimits {
  return { maxDepth: config.MAX_JSON_DEPTH, maxValues: config.MAX_JSON_VALUES };
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

/** A value inside a document, by the way that leads to it: pointers are written only for faults. */
interface Place {
  value: object;
  key: string;
  parent?: Place;
  depth: number;
}

/**
 * Throws `validation_failed` for nesting deeper than `maxDepth`, for more values than `maxValues`, for an object with very
 * many members, and for a key that could pollute a prototype. It looks at `maxValues` values at most, before anything else
 * looks at the document, and walks without recursion, because what JSON.parse can nest would overflow the stack.
 */
export function checkJson(document: unknown, { maxDepth, maxValues }: JsonLimits): void {
  if (!isContainer(document)) return;
  const open: Place[] = [{ value: document, key: '', depth: 0 }];
  let values = 0;
  for (let place = open.pop(); place; place = open.pop()) {
    const { value, depth } = place;
    if (depth === maxDepth) refuse(place, `is nested deeper than ${maxDepth} levels`);
    const keys = Array.isArray(value) ? undefined : Object.keys(value);
    const size = keys?.length ?? (value as unknown[]).length;
    values += size;
    if (values > maxValues) {
      refuse(place, `has ${size} values, with which the document has more than ${maxValues}`);
    }
    if (keys && size > MOST_MEMBERS) refuse(place, `has more than ${MOST_MEMBERS} members`);
    for (let index = 0; index < size; index++) {
      const key = keys?.[index] ?? String(index);
      const child = (value as Record<string, unknown>)[key];
      if (keys && FORBIDDEN_KEYS.has(key)) refuse({ value, key, parent: place }, 'is not an allowed name');
      if (isContainer(child)) open.push({ value: child, key, parent: place, depth: depth + 1 });
    }
  }
}

function isContainer(value: unknown): value is object {
  return typeof value === 'object' && value !== null;
}

function refuse(place: Omit<Place, 'depth'>, detail: string): never {
  const keys: string[] = [];
  for (let at = place; at.parent; at = at.parent) keys.push(at.key);
  const pointer = keys
    .reverse()
    .map((key) => `/${key.replaceAll('~', '~0').replaceAll('/', '~1')}`)
    .join('');
  throw new AppError('validation_failed', `The body is not valid: ${`${pointer} ${detail}`.trim()}.`, {
    faults: [{ pointer, detail }],
  });
}

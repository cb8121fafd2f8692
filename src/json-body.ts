import type { NestExpressApplication } from '@nestjs/platform-express';
import type { NextFunction, Request, Response } from 'express';
import type { Config } from './config.js';
import { quoted } from './dto.js';
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
 * {@link checkJsonText} and {@link checkJson} refuse.
 */
export function useJsonBody(
  app: NestExpressApplication,
  config: Pick<Config, 'MAX_BODY_BYTES' | 'MAX_JSON_DEPTH' | 'MAX_JSON_VALUES'>,
): void {
  const limits = jsonLimits(config);
  app.use(requireJson);
  // The bytes, because Express's own reader of JSON parses what it gets, whatever that costs.
  app.useBodyParser('raw', { limit: config.MAX_BODY_BYTES, type: () => true });
  app.use((request: Request, _response: Response, next: NextFunction) => {
    if (Buffer.isBuffer(request.body)) request.body = parseJson(request.body, limits);
    next();
  });
}

/** The document in UTF-8 (RFC 8259, section 8.1); an empty body is an empty object. */
function parseJson(body: Buffer, limits: JsonLimits): unknown {
  if (body.length === 0) return {};
  // What counts in it is ASCII, which UTF-8 and ISO 8859-1 write alike.
  checkJsonText(body.toString('latin1'), limits);
  const document = parse(new TextDecoder().decode(body));
  checkJson(document, limits);
  return document;
}

function parse(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw new AppError('invalid_json', cause instanceof Error ? cause.message : String(cause), { cause });
  }
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
  const [, charset = 'utf-8'] =
    /;\s*charset\s*=\s*"?([^\s;"]*)/i.exec(request.headers['content-type'] ?? '') ?? [];
  if (hasBody && !/^utf-?8$/i.test(charset)) {
    throw new AppError('unsupported_media_type', `Send the body in UTF-8, not in ${quoted(charset)}.`);
  }
  next();
}

const QUOTE = 0x22;
const COMMA = 0x2c;
const BACKSLASH = 0x5c;
const isOpening = (code: number) => code === 0x5b || code === 0x7b;
const isClosing = (code: number) => code === 0x5d || code === 0x7d;

/**
 * Throws `validation_failed` for a text with more than `maxValues` members and elements, before it is parsed: what
 * JSON.parse takes for objects of ever new names is a hundred times what their bytes cost, and keeps the event loop.
 */
export function checkJsonText(text: string, { maxValues }: Pick<JsonLimits, 'maxValues'>): void {
  let values = 0;
  let isFirst = false; // whether a list or an object has just been opened
  for (let at = 0; at < text.length; at++) {
    const code = text.charCodeAt(at);
    if (code <= 0x20) continue;
    if (code === COMMA || (isFirst && !isClosing(code))) values++;
    isFirst = isOpening(code);
    if (code === QUOTE) at = endOfString(text, at);
  }
  if (values <= maxValues) return;
  const detail = `has ${values} members and elements, which is more than ${maxValues}`;
  throw new AppError('validation_failed', `The body is not valid: it ${detail}.`, {
    faults: [{ pointer: '', detail }],
  });
}

/** The place of the quote that ends the string which begins at `from`, or the end of the text. */
function endOfString(text: string, from: number): number {
  let at = from + 1;
  for (; at < text.length; at++) {
    const code = text.charCodeAt(at);
    if (code === QUOTE) break;
    if (code === BACKSLASH) at++;
  }
  return at;
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

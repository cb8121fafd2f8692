import type { z } from 'zod';
import { AppError, type ErrorCode, type Fault } from '../errors.js';

/** Names that reach an object's prototype in careless code; refused as ids and as keys wherever clients choose names. */
const FORBIDDEN_NAMES: ReadonlySet<string> = new Set(['__proto__', 'constructor', 'prototype']);

/** Deeper JSON than this overflows the stack of recursive code that reads it later, JSON.stringify among it. */
const MAX_DEPTH = 256;

/** A hostile body can have a fault in every few bytes; a client needs no more of them than this. */
const MAX_FAULTS = 1000;
/** Of the fault that the message tells: it can repeat what a client sent. */
const MAX_DETAIL_CHARS = 1000;

const NOUNS: Record<string, string> = {
  object: 'an object',
  record: 'an object',
  array: 'an array',
  string: 'a text',
  number: 'a number',
  int: 'a whole number',
  boolean: 'true or false',
};

const UNITS: Record<string, string> = { string: 'characters', array: 'items' };

/** Whether `name` must not be an id or a key. */
export function isForbiddenName(name: string): boolean {
  return FORBIDDEN_NAMES.has(name);
}

/** Appends path segments to an RFC 6901 JSON pointer, escaping `~` and `/`. */
export function toPointer(base: string, ...segments: PropertyKey[]): string {
  return segments.reduce<string>(
    (pointer, segment) => `${pointer}/${String(segment).replaceAll('~', '~0').replaceAll('/', '~1')}`,
    base,
  );
}

/** A value inside a JSON document, by the way that leads to it: pointers are written only for faults. */
interface Place {
  value: unknown;
  key: PropertyKey;
  parent?: Place;
  depth: number;
}

/**
 * Finds what no schema sees: forbidden keys at any depth, and nesting beyond 256 levels; about 1,000 faults at most.
 * Works without recursion, so that hostile nesting can't overflow the stack here already.
 */
export function findUnsafeJson(value: unknown, pointer: string): Fault[] {
  const faults: Fault[] = [];
  const pending: Place[] = [{ value, key: '', depth: 0 }];
  for (let place = pending.pop(); place && faults.length < MAX_FAULTS; place = pending.pop()) {
    const { value: container, depth } = place;
    if (typeof container !== 'object' || container === null) continue;
    if (depth >= MAX_DEPTH) {
      faults.push({
        pointer: locate(place, pointer),
        detail: `is nested more than ${MAX_DEPTH} levels deep`,
      });
      continue;
    }
    for (const key of Array.isArray(container) ? container.keys() : Object.keys(container)) {
      const child: Place = { value: Reflect.get(container, key), key, parent: place, depth: depth + 1 };
      if (typeof key === 'string' && isForbiddenName(key)) {
        faults.push({ pointer: locate(child, pointer), detail: `the name "${key}" is not allowed` });
      } else if (typeof child.value === 'object') {
        pending.push(child);
      }
    }
  }
  return faults;
}

function locate(place: Place, base: string): string {
  const keys: PropertyKey[] = [];
  for (let at = place; at.parent !== undefined; at = at.parent) keys.push(at.key);
  return toPointer(base, ...keys.reverse());
}

/** Checks `value` against `schema`; what is wrong goes into `faults`, and then nothing is returned. */
export function parseShape<Schema extends z.ZodType>(
  schema: Schema,
  value: unknown,
  at: { pointer: string; faults: Fault[] },
): z.output<Schema> | undefined {
  const parsed = schema.safeParse(value, { reportInput: true });
  if (parsed.success) return parsed.data;
  for (const issue of parsed.error.issues) {
    const pointer = toPointer(at.pointer, ...issue.path);
    if (issue.code === 'unrecognized_keys') {
      // Forbidden names are reported by findUnsafeJson, wherever they are.
      for (const key of issue.keys) if (!isForbiddenName(key)) at.faults.push(unknownProperty(pointer, key));
    } else {
      at.faults.push({ pointer, detail: describe(issue) });
    }
  }
  return undefined;
}

/** Throws an `AppError` with all faults, its message `<what>: <first fault> (and n more)`; without faults it does nothing. */
export function refuse(code: ErrorCode, what: string, faults: readonly Fault[]): void {
  const [first] = faults;
  if (first === undefined) return;
  const more = faults.length === 1 ? '' : ` (and ${faults.length - 1} more)`;
  throw new AppError(
    code,
    `${what}: ${first.pointer} ${first.detail.slice(0, MAX_DETAIL_CHARS).replace(/\.+$/, '')}${more}.`,
    {
      faults: faults.slice(0, MAX_FAULTS),
    },
  );
}

function unknownProperty(pointer: string, key: string): Fault {
  return { pointer: toPointer(pointer, key), detail: `the property "${key}" is not known here` };
}

function describe(issue: z.core.$ZodIssue): string {
  if (issue.code === 'invalid_type') {
    return issue.input === undefined ? 'is required' : `must be ${NOUNS[issue.expected] ?? issue.expected}`;
  }
  if (issue.code === 'too_small') {
    const { origin, minimum } = issue;
    if (origin in UNITS && minimum === 1) return 'must not be empty';
    return describeBound(origin, issue.inclusive ? 'at least' : 'more than', minimum);
  }
  if (issue.code === 'too_big') {
    return describeBound(issue.origin, issue.inclusive ? 'at most' : 'less than', issue.maximum);
  }
  if (issue.code === 'invalid_value') return `must be one of ${issue.values.map(String).join(', ')}`;
  return issue.message;
}

function describeBound(origin: string, relation: string, bound: number | bigint): string {
  const unit = UNITS[origin];
  return unit === undefined ? `must be ${relation} ${bound}` : `must have ${relation} ${bound} ${unit}`;
}

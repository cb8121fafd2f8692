import { setImmediate as nextTurn } from 'node:timers/promises';
import { ValidationPipe } from '@nestjs/common';
import type { ArgumentMetadata, Type } from '@nestjs/common';
import { plainToInstance } from 'class-transformer';
import { getMetadataStorage, validateSync } from 'class-validator';
import type { ValidationError, ValidatorOptions } from 'class-validator';
import { STRUCTURE } from './dto.js';
import { AppError } from './errors.js';
import type { Fault } from './errors.js';

/** Elements that a list may have where its DTO does not say how many. */
const MOST_ELEMENTS = 1000;
/** Faults after which nothing further is looked at. */
const ENOUGH_FAULTS = 1000;
/** Of the fault that the message tells: property names can be as long as a body. */
const MOST_CHARACTERS = 1000;
/** How long one request may keep the event loop before the others get their turn, ms. */
const TURN_MS = 10;

/** What a DTO says of the properties that are not plain values. */
interface Structure {
  /** How many elements the lists may have. */
  most: ReadonlyMap<string, number>;
  lists: ReadonlyMap<string, Type<object>>;
  nested: ReadonlyMap<string, Type<object>>;
  given: ReadonlySet<string>;
}

/** One request under examination. */
interface Examination {
  faults: Fault[];
  turnBegan: number;
}

/** A value of a request: what it should be, and where it is. */
interface Part {
  value: Record<string, unknown>;
  type: Type<object>;
  pointer: string;
}

const RULES: ValidatorOptions = {
  whitelist: true,
  forbidNonWhitelisted: true,
  forbidUnknownValues: false, // a DTO without rules takes an empty object
  validationError: { target: false, value: false },
};

/**
 * Checks what a request brings against its DTO; throws `validation_failed` with its faults. Nest's own pipe hands whole bodies
 * to class-transformer and class-validator, which copy and examine every element even of a list that is too long, in one
 * turn. So lists are refused for their length before anything else; each object is examined by itself, without what is
 * below it; and the event loop gets its turn in between.
 */
export class RequestPipe extends ValidationPipe {
  constructor() {
    super({ ...RULES, transform: true, exceptionFactory: (errors) => refusal(faultsOf(errors, '')) });
  }

  override async transform(value: unknown, metadata: ArgumentMetadata): Promise<unknown> {
    const { metatype } = metadata;
    if (!metatype || !this.toValidate(metadata)) return super.transform(value, metadata) as Promise<unknown>;
    if (!isRecord(value)) return super.transform(shallow(value), metadata) as Promise<unknown>;
    const tooLong = longLists(value, metatype, '');
    if (tooLong.length > 0) throw refusal(tooLong);
    const examination = { faults: [], turnBegan: performance.now() };
    const checked = await this.examine({ value, type: metatype, pointer: '' }, examination);
    if (examination.faults.length > 0) throw refusal(examination.faults);
    return checked;
  }

  /** The value as its type, as far as it has no faults. */
  private async examine(part: Part, examination: Examination): Promise<object> {
    const { value, type, pointer } = part;
    const checked = plainToInstance(type, shallow(value));
    examination.faults.push(...faultsOf(validateSync(checked, RULES), pointer));
    return Object.assign(checked, await this.examineBelow(part, examination));
  }

  /** The properties of an object that have a structure of their own. */
  private async examineBelow(
    { value, type, pointer }: Part,
    examination: Examination,
  ): Promise<Record<string, unknown>> {
    const { lists, nested, given } = structureOf(type);
    const below: Record<string, unknown> = {};
    for (const key of given) if (isRecord(value[key])) below[key] = value[key];
    for (const [key, nestedType] of nested) {
      const child = value[key];
      if (!isRecord(child)) continue;
      const part = { value: child, type: nestedType, pointer: pointerOf(pointer, key) };
      below[key] = await this.examine(part, examination);
    }
    for (const [key, elementType] of lists) {
      const list = value[key];
      if (!Array.isArray(list)) continue;
      const elements: unknown[] = (below[key] = []);
      for (const [index, element] of list.entries()) {
        if (examination.faults.length >= ENOUGH_FAULTS) return below;
        const at = pointerOf(pointer, key, index);
        if (!isRecord(element)) {
          examination.faults.push({ pointer: at, detail: 'must be an object' });
          continue;
        }
        const part = { value: element, type: elementType, pointer: at };
        elements.push(await this.examine(part, examination));
        await giveTurn(examination);
      }
    }
    return below;
  }
}

/** Each that waits here has a turn of the loop of its own: many long requests at once keep it no longer than one. */
let lastTurn = Promise.resolve();

async function giveTurn(examination: Examination): Promise<void> {
  if (performance.now() - examination.turnBegan < TURN_MS) return;
  lastTurn = lastTurn.then(() => nextTurn());
  await lastTurn;
  examination.turnBegan = performance.now();
}

/** The lists that have more elements than they may, down to the objects of lists that do not. */
function longLists(value: unknown, type: Type<object>, pointer: string): Fault[] {
  if (!isRecord(value)) return [];
  const { most, lists, nested } = structureOf(type);
  return Object.entries(value).flatMap(([key, child]) => {
    const at = pointerOf(pointer, key);
    const nestedType = nested.get(key);
    if (!Array.isArray(child)) return nestedType ? longLists(child, nestedType, at) : [];
    const limit = most.get(key) ?? MOST_ELEMENTS;
    if (child.length > limit) {
      return [{ pointer: at, detail: `${key} must contain no more than ${limit} elements` }];
    }
    const elementType = lists.get(key);
    if (!elementType) return [];
    return child.flatMap((element, index) => longLists(element, elementType, pointerOf(at, index)));
  });
}

/** What class-transformer and class-validator get to see of a value: whether what is below it is a list or an object, and no more. */
function shallow(value: unknown): unknown {
  if (!isRecord(value)) return empty(value);
  return Object.fromEntries(
    Object.entries(value).map(([key, child]) => [
      key,
      Array.isArray(child) ? child.map(empty) : empty(child),
    ]),
  );
}

function empty(value: unknown): unknown {
  return Array.isArray(value) ? [] : isRecord(value) ? {} : value;
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

const structures = new WeakMap<Type<object>, Structure>();

function structureOf(type: Type<object>): Structure {
  const known = structures.get(type);
  if (known) return known;
  const rules = getMetadataStorage().getTargetValidationMetadatas(type, '', false, false);
  const named = (name: string) => rules.filter((rule) => rule.name === name);
  const types = (name: string) =>
    new Map(
      named(name).map(({ propertyName, constraints }) => {
        const [typeOf] = constraints as [() => Type<object>];
        return [propertyName, typeOf()] as const;
      }),
    );
  const structure = {
    most: new Map(named('arrayMaxSize').map((rule) => [rule.propertyName, Number(rule.constraints[0])])),
    lists: types(STRUCTURE.list),
    nested: types(STRUCTURE.nested),
    given: new Set(named(STRUCTURE.given).map(({ propertyName }) => propertyName)),
  };
  structures.set(type, structure);
  return structure;
}

function refusal(faults: Fault[]): AppError {
  const [first, ...others] = faults;
  const more = others.length > 0 ? ` (and ${others.length} more)` : '';
  const detail = (first?.detail ?? 'it has a fault').slice(0, MOST_CHARACTERS).replace(/\.+$/, '');
  return new AppError('validation_failed', `The request is not valid: ${detail}${more}.`, { faults });
}

function faultsOf(errors: ValidationError[], parent: string): Fault[] {
  return errors.flatMap(({ property, constraints = {}, children = [] }) => {
    const pointer = pointerOf(parent, property);
    const own = Object.values(constraints).map((detail) => ({ pointer, detail }));
    return [...own, ...faultsOf(children, pointer)];
  });
}

function pointerOf(base: string, ...path: PropertyKey[]): string {
  return path.reduce<string>(
    (pointer, key) => `${pointer}/${String(key).replaceAll('~', '~0').replaceAll('/', '~1')}`,
    base,
  );
}

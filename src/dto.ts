import { applyDecorators } from '@nestjs/common';
import type { Type } from '@nestjs/common';
import { Transform } from 'class-transformer';
import {
  ArrayMaxSize,
  IsArray,
  IsObject,
  ValidateBy,
  ValidateIf,
  isISO8601,
  isObject,
} from 'class-validator';
import type { ValidationOptions } from 'class-validator';

const LONE_SURROGATE = /\p{Surrogate}/u;
const MOMENT = /^\d{4}-\d\d-\d\d(T\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d:\d\d))?$/;

/** Refuses what a PostgreSQL `text` column can't keep: it rejects U+0000, and a lone surrogate would be changed on the way. */
export function IsStorableText(options?: ValidationOptions): PropertyDecorator {
  return ValidateBy(
    {
      name: 'isStorableText',
      validator: {
        validate: (value) =>
          typeof value !== 'string' || !(value.includes('\0') || LONE_SURROGATE.test(value)),
        defaultMessage: () => '$property must not contain U+0000 or lone surrogates',
      },
    },
    options,
  );
}

/** What {@link ListOf}, {@link Nested} and {@link AsGiven} leave for {@link RequestPipe} to read, by the names of their constraints. */
export const STRUCTURE = { list: 'isListOfObjects', nested: 'isNested', given: 'isAsGiven' } as const;

/** A list of objects, which are checked one by one as `type`: refused before anybody looks at them where there are more than `most`. */
export function ListOf(type: () => Type<object>, most: number): PropertyDecorator {
  const others = (value: unknown) =>
    Array.isArray(value) ? [...value.keys()].filter((index) => !isObject(value[index])) : [];
  const isListOfObjects = ValidateBy({
    name: STRUCTURE.list,
    constraints: [type],
    validator: {
      validate: (value) => others(value).length === 0,
      defaultMessage: (context) =>
        `each value of $property must be an object, unlike those at index ${others(context?.value).slice(0, 100).join(', ')}`,
    },
  });
  return applyDecorators(IsArray(), ArrayMaxSize(most), isListOfObjects);
}

/** An object that is checked as `type`. */
export function Nested(type: () => Type<object>): PropertyDecorator {
  const isNested = ValidateBy({
    name: STRUCTURE.nested,
    constraints: [type],
    validator: { validate: () => true },
  });
  return applyDecorators(IsObject(), isNested);
}

/**
 * Takes a date, or a moment that says its offset from UTC (ISO 8601; RFC 3339 for the moment): one without would be
 * another moment on each server.
 */
export function IsMoment(options?: ValidationOptions): PropertyDecorator {
  return ValidateBy(
    {
      name: 'isMoment',
      validator: {
        validate: (value) =>
          typeof value === 'string' &&
          MOMENT.test(value) &&
          isISO8601(value, { strict: true }) &&
          !Number.isNaN(Date.parse(value)),
        defaultMessage: () =>
          '$property must be a date or a moment in ISO 8601, such as 2026-01-31 or 2026-01-31T12:00:00Z (in an address, + is written %2B)',
      },
    },
    options,
  );
}

/** Lets a property be left out. With `@IsOptional()` null would pass as well, past all other checks. */
export function MayBeAbsent(): PropertyDecorator {
  return ValidateIf((_object, value) => value !== undefined);
}

/** Takes an object of free-form JSON over as it came, and does not look into it: class-transformer would copy it. */
export function AsGiven(): PropertyDecorator {
  const isAsGiven = ValidateBy({ name: STRUCTURE.given, validator: { validate: () => true } });
  return applyDecorators(IsObject(), isAsGiven);
}

/** A whole number of a query string; anything else stays text, for `@IsInt()` to refuse. `Number` alone would take `''` for 0. */
export function QueryInteger(): PropertyDecorator {
  return Transform(({ value }: { value: unknown }) =>
    typeof value === 'string' && /^-?\d{1,15}$/.test(value) ? Number(value) : value,
  );
}

/** `true` or `false` of a query string; anything else stays text, for `@IsBoolean()` to refuse. */
export function QueryBoolean(): PropertyDecorator {
  return Transform(({ value }: { value: unknown }) =>
    value === 'true' ? true : value === 'false' ? false : value,
  );
}

type NullableKey<Row> = { [Key in keyof Row]: null extends Row[Key] ? Key : never }[keyof Row];

/** A row of the database on the wire: what is null in the one is left out of the other. */
export type Present<Row> = Omit<Row, NullableKey<Row>> & {
  [Key in NullableKey<Row>]?: Exclude<Row[Key], null>;
};

/** Leaves out the properties that are null. */
export function present<Row extends object>(row: Row): Present<Row> {
  return Object.fromEntries(Object.entries(row).filter(([, value]) => value !== null)) as Present<Row>;
}

/** Client-given text inside a sentence: quoted, and cut after 100 characters. */
export function quoted(text: string): string {
  return JSON.stringify(text.length > 100 ? `${text.slice(0, 100)}…` : text);
}

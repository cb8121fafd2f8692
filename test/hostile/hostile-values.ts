import type { Random } from '../support/random.js';

/** What clients send where something else is expected. */
const VALUES: readonly unknown[] = [
  null,
  true,
  false,
  0,
  -1,
  1.5,
  -0,
  1e308,
  2 ** 31,
  2 ** 53,
  -(2 ** 63),
  '',
  ' ',
  '0',
  'null',
  'NaN',
  '\0',
  'a\0b',
  '\ud800',
  '\udfff\ud800',
  '\u202e\u2066bidi\u2069',
  '\ufeff',
  '💥'.repeat(50),
  'İ'.repeat(201),
  "'; DROP TABLE execution; --",
  '{{ x | append: x }}',
  '../../etc/passwd',
  '%00',
  'x'.repeat(201),
  'x'.repeat(20_000),
  [],
  {},
  [[]],
  [null],
  { a: null },
  { toString: 1, valueOf: null, hasOwnProperty: 1 },
  { length: 5, 0: 'x' },
  Array.from({ length: 1200 }, () => ({})),
  Array.from({ length: 300 }, () => 'x'),
  Object.fromEntries(Array.from({ length: 300 }, (_, index) => [`k${index}`, index])),
];

/** Texts of addresses and headers: what they are made of is there in `ids`, too. */
const TEXTS: readonly string[] = [
  '',
  'x',
  '0',
  '-1',
  '-0',
  '1e3',
  'NaN',
  'Infinity',
  '9007199254740992',
  '9223372036854775808',
  '99999999999999999999999',
  '2026-01-31T12:00:00+23:59',
  '2026-01-31T12:00:00-23:59',
  '0000-01-01',
  '9999-12-31T23:59:59.999999999Z',
  '999999-01-01T00:00:00Z',
  '-000001-01-01T00:00:00Z',
  '2026-02-30',
  '2016-12-31T23:59:60Z',
  'true',
  'TRUE',
  'null',
  '%00',
  '%E0%A4%A',
  '%ED%A0%80',
  '%F0%9F%92%A5',
  '%2e%2e%2f',
  'a%2Fb',
  "'%20OR%201=1",
  '%7B%7B%20x%20%7D%7D',
  'completed,completed,running',
  '__proto__',
  'constructor',
  'x'.repeat(300),
  '00000000-0000-0000-0000-000000000000',
  'ffffffff-ffff-ffff-ffff-ffffffffffff',
];

const KEYS = [
  '__proto__',
  'constructor',
  'prototype',
  'toString',
  '',
  '\0',
  'x'.repeat(3000),
  '\ud800',
  '/~',
];

export function hostileValue(random: Random): unknown {
  return random.pick(VALUES);
}

export function hostileText(random: Random, ids: readonly string[]): string {
  return random.pick(random.next() < 0.4 ? ids : TEXTS);
}

/** A copy of a JSON value with one thing about it that is wrong. */
export function mutate(value: unknown, random: Random): unknown {
  if (typeof value !== 'object' || value === null || random.next() < 0.15) return hostileValue(random);
  if (Array.isArray(value)) {
    if (value.length === 0 || random.next() < 0.2) return [...value, hostileValue(random)];
    const index = random.int(0, value.length - 1);
    return value.map((element: unknown, at) => (at === index ? mutate(element, random) : element));
  }
  const members = Object.entries(value);
  const choice = random.next();
  if (members.length === 0 || choice < 0.15)
    return withMember(members, random.pick(KEYS), hostileValue(random));
  const index = random.int(0, members.length - 1);
  if (choice < 0.3) return Object.fromEntries(members.toSpliced(index, 1));
  return Object.fromEntries(
    members.map(([key, child], at) => [key, at === index ? mutate(child, random) : child]),
  );
}

/** Such that JSON.stringify writes a member of any name. */
function withMember(members: [string, unknown][], key: string, value: unknown): object {
  const object = Object.fromEntries(members);
  Object.defineProperty(object, key, { value, enumerable: true, configurable: true, writable: true });
  return object;
}

/** The text of a body, now and then one that is no JSON. */
export function bodyText(value: unknown, random: Random): string {
  const text = JSON.stringify(value) ?? '';
  const choice = random.next();
  if (choice < 0.8) return text;
  if (choice < 0.85) return text.slice(0, random.int(0, text.length));
  if (choice < 0.88) return `{"a":${'['.repeat(5000)}${']'.repeat(5000)}}`;
  if (choice < 0.9) return text.replace('{', '{"__proto__": {"polluted": true}, ');
  if (choice < 0.92) return text.replace(/"[^"]*"/, '1e999');
  if (choice < 0.94) return `${text}${text}`;
  if (choice < 0.96) return `\ufeff${text}`;
  return random.pick(['', 'null', '1', '"x"', '[]', '{', '\0', '[1,]', '{"a":1,"a":2}', 'x'.repeat(100)]);
}

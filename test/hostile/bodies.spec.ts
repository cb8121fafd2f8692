import { describe, expect, it } from '@jest/globals';
import { ERROR_CODES } from '../../src/errors.js';
import { expectUnharmed, withBystander } from '../support/bystander.js';
import { cheap, rounds } from '../support/effort.js';
import { Studio, echo } from '../support/studio.js';
import { withProcesses } from '../support/with-processes.js';
import { endOf } from './attacks.js';
import { OPERATIONS, placesIn, sample } from './interface.js';
import type { Operation, Place } from './interface.js';

/** A little less than `MAX_BODY_BYTES`, for what is around it. */
const BYTES = 1_040_000;
const METHODS = ['GET', 'POST', 'PUT', 'PATCH', 'DELETE'];

const list = (element: string, bytes: number) =>
  `[${Array.from({ length: Math.floor(bytes / (element.length + 1)) }, () => element).join(',')}]`;
const members = (count: number) =>
  `{${Array.from({ length: count }, (_, index) => `"k${index}":{}`).join(',')}}`;
/** Objects of one member each, no two of which have the same name. */
const strangers = (count: number) =>
  `[${Array.from({ length: count }, (_, index) => `{"k${index}":0}`).join(',')}]`;

/** The cheapest worst that can stand in a place, as JSON of almost 1 MiB. */
const WORST: Record<Place['kind'], readonly string[]> = {
  list: [
    list('{}', BYTES),
    list('0', BYTES),
    // As many as may pass.
    list('{}', 2999),
    list(members(1500), BYTES),
    strangers(75_000),
  ],
  text: [JSON.stringify('x'.repeat(BYTES)), `"${'\\u0001'.repeat(BYTES / 6)}"`, list('{}', BYTES)],
  object: [
    `{"a":${list('{}', BYTES)}}`,
    `{"a":${list('0', 190_000)}}`,
    `{"a":${strangers(75_000)}}`,
    // As many as may pass.
    `{"a":${strangers(49_000)}}`,
    members(50_000),
    `{"a":${list(members(1500), BYTES)}}`,
    // Almost as many values as may pass, in objects of their own.
    `{"a":${list(list('{}', 2700), 260_000)}}`,
  ],
};

/** A body whose place is filled with this JSON. */
function bodyWith({ body }: Operation, { way }: Place, json: string, names: object): string {
  const value = sample(body ?? {}, { ...names });
  const marker = 'the place to be filled';
  let at = value as Record<string, unknown>;
  for (const [index, key] of way.entries()) {
    const isLast = index === way.length - 1;
    const next = way[index + 1] === '0' ? [] : {};
    if (isLast) at[key] = marker;
    else at = at[key] = Object.assign(next, Object(at[key]) === at[key] ? at[key] : {});
  }
  return JSON.stringify(value).replace(JSON.stringify(marker), () => json);
}

const system = withProcesses();
let server: Awaited<ReturnType<typeof system.start>> | undefined;

async function running() {
  const target = (server ??= await system.start());
  const studio = new Studio(target.url);
  const deployment_name = await studio.deploy(echo());
  const { body } = await studio.json<{ workflow_id: string }>('/api/workflows', {
    method: 'POST',
    body: { name: 'attacked', configuration: echo() },
  });
  return { server: target, studio, names: { deployment_name, workflow_id: body.workflow_id } };
}

/** The routes whose bodies run the code that all others share, too. */
const TYPICAL = ['POST /api/workflows', 'POST /api/workflows/execute'];
const withBody = cheap(
  OPERATIONS.filter(({ body }) => body !== undefined).map((operation) => {
    const name = `${operation.method} ${operation.path}`;
    return { name, operation, isDear: !TYPICAL.includes(name) };
  }),
);
const placesOf = (operation: Operation) => {
  const places = placesIn(operation.body ?? {});
  return places.filter((_, index) => index % rounds(1, 8) === 0);
};

describe('the largest body that is allowed, full of the cheapest that costs most, harms nobody else', () => {
  it.each(withBody)(
    '$name',
    async ({ operation }) => {
      const { server: target, studio, names } = await running();
      const path = operation.path.replace('{workflow_id}', names.workflow_id);
      const witness = await withBystander(target, async () => {
        const ends: string[] = [];
        for (const place of placesOf(operation)) {
          for (const json of WORST[place.kind]) {
            const body = bodyWith(operation, place, json, names);
            const answer = await fetch(`${studio.url}${path}`, {
              method: operation.method,
              headers: { 'Content-Type': 'application/json' },
              body,
            });
            const text = await answer.text();
            const problem: unknown = answer.ok ? undefined : JSON.parse(text);
            const end = endOf({ status: answer.status, body: problem });
            const isDocumented = answer.ok || (end in ERROR_CODES && end !== 'internal_error');
            if (!isDocumented || (!answer.ok && text.length > 300_000)) {
              ends.push(`${place.way.join('/')} = ${json.slice(0, 30)}: ${end}, ${text.length} characters`);
            }
          }
        }
        return ends;
      });
      expect(witness.outcome).toEqual([]);
      expectUnharmed(witness);
    },
    300_000,
  );
});

it('every route refuses other methods, media types and bodies with a problem', async () => {
  const { studio, names } = await running();
  const faults: string[] = [];
  for (const { path, body: schema, method: right } of OPERATIONS) {
    const address = path.replaceAll(/\{(\w+)\}/g, (_, name: string) => Object(names)[name] ?? 'x');
    const routes = OPERATIONS.filter((operation) => operation.path === path).map(({ method }) => method);
    const attempts = [
      ...METHODS.filter((method) => !routes.includes(method)).map((method) => [
        method,
        'application/json',
        '{}',
      ]),
      ...(schema
        ? [
            [right, 'text/plain', 'x'],
            [right, 'application/json', '{'],
            [right, 'application/json', '[]'],
          ]
        : []),
    ] as [string, string, string][];
    for (const [method, type, text] of attempts) {
      const body = method === 'GET' ? undefined : text;
      const answer = await fetch(`${studio.url}${address}`, {
        method,
        headers: { 'Content-Type': type },
        body,
      });
      const isProblem = answer.headers.get('content-type')?.startsWith('application/problem+json');
      const content = await answer.text();
      if (answer.status >= 500 || answer.status < 400 || !isProblem) {
        faults.push(`${method} ${address} ${type} ${text}: ${answer.status} ${content.slice(0, 200)}`);
      }
    }
  }
  expect(faults).toEqual([]);
});

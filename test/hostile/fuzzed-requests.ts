import type { Random } from '../support/random.js';
import { bodyText, hostileText, mutate } from './hostile-values.js';
import { OPERATIONS, sample } from './interface.js';
import type { Operation } from './interface.js';

/** What exists on the server that is asked. */
export interface Known {
  /** By the names of parameters and properties: `workflow_id`, `deployment_name` … */
  names: Record<string, string>;
  /** Everything that may stand where an id is expected. */
  ids: string[];
}

/** The bytes of a request, and whether the client's end is closed after them. */
export interface FuzzedRequest {
  bytes: Buffer;
  half: boolean;
  method: string;
}

const METHODS = ['GET', 'HEAD', 'POST', 'PUT', 'PATCH', 'DELETE', 'OPTIONS', 'TRACE', 'PURGE', 'CONNECT'];
const MEDIA_TYPES = [
  'text/plain',
  'application/xml',
  'application/json; charset=utf-16',
  'json',
  '',
  'a/b;;',
  'multipart/form-data',
];
const ODD_HEADERS = [
  'Expect: 100-continue',
  'Expect: nonsense',
  'Content-Encoding: gzip',
  'Content-Encoding: nonsense',
  'Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings',
  'Upgrade: websocket\r\nConnection: Upgrade',
  'Host: other',
  'Content-Length: 3',
  'Content-Length: -1',
  'Transfer-Encoding: chunked',
  'Transfer-Encoding: gzip, chunked',
  'Content-Type: text/plain',
  'X-Request-Id: a b',
  'X-HTTP-Method-Override: DELETE',
  'Origin: null',
  'Range: bytes=0-10',
  'If-None-Match: *',
  'Cookie: a=b',
  'Accept: application/xml',
  'Te: trailers',
  `X-Long: ${'x'.repeat(9000)}`,
  ' folded: x',
  'No colon',
];

/** One request that is more or less wrong. */
export function fuzzedRequest(random: Random, known: Known): FuzzedRequest {
  const operation = random.pick(OPERATIONS);
  const method = random.next() < 0.85 ? operation.method : random.pick(METHODS);
  const body = bodyOf(operation, random, known);
  const target = targetOf(operation, random, known);
  const headers = headersOf(operation, random, known);
  const framed = frame(Buffer.from(body ?? '', 'utf8'), random, body !== undefined);
  const version =
    random.next() < 0.95 ? 'HTTP/1.1' : random.pick(['HTTP/1.0', 'HTTP/0.9', 'HTTP/2.0', 'http/1.1']);
  const head = [`${method} ${target} ${version}`, ...headers, ...framed.headers].join('\r\n');
  return {
    bytes: Buffer.concat([Buffer.from(`${head}\r\n\r\n`, 'latin1'), framed.bytes]),
    half: random.next() < 0.2,
    method,
  };
}

function bodyOf({ body }: Operation, random: Random, { names }: Known): string | undefined {
  if (!body) return random.next() < 0.9 ? undefined : bodyText({ a: 1 }, random);
  let value = sample(body, names);
  for (let times = random.int(0, 2); times > 0; times--) value = mutate(value, random);
  return bodyText(value, random);
}

function targetOf({ path, query }: Operation, random: Random, { names, ids }: Known): string {
  const filled = path.replaceAll(/\{(\w+)\}/g, (_, name: string) =>
    random.next() < 0.7 ? (names[name] ?? '') : hostileText(random, ids),
  );
  const asked = [...query, 'unknown', 'limit', '__proto__'].filter(() => random.next() < 0.3);
  const parameters = asked.map((name) => `${name}=${queryText(random, ids)}`);
  if (parameters[0] && random.next() < 0.1) parameters.push(parameters[0], `${asked[0]}[a][b]=1`);
  const address = parameters.length > 0 ? `${filled}?${parameters.join('&')}` : filled;
  if (random.next() < 0.97) return address.replaceAll(' ', '%20');
  return random.pick([
    '*',
    '//',
    '/..',
    `http://elsewhere${address}`,
    `${address}#x`,
    '/api/%',
    '\\',
    `/${'x'.repeat(8000)}`,
  ]);
}

function queryText(random: Random, ids: string[]): string {
  const text = hostileText(random, ids);
  return random.next() < 0.5 ? text : encodeURIComponent(text);
}

function headersOf({ headers }: Operation, random: Random, { ids }: Known): string[] {
  const lines = random.next() < 0.98 ? ['Host: x'] : [];
  if (random.next() < 0.95) lines.push('Connection: close');
  lines.push(`Content-Type: ${random.next() < 0.95 ? 'application/json' : random.pick(MEDIA_TYPES)}`);
  for (const name of headers) {
    if (random.next() < 0.3) lines.push(`${name}: ${cursor(random, ids)}`);
    if (random.next() < 0.05) lines.push(`${name}: ${cursor(random, ids)}`);
  }
  if (random.next() < 0.15) lines.push(random.pick(ODD_HEADERS));
  return lines;
}

function cursor(random: Random, ids: string[]): string {
  const text = hostileText(random, ids);
  return random.next() < 0.5 ? `${random.pick(ids)}:${text}` : text;
}

/** How the body is delimited; now and then wrongly. */
function frame(body: Buffer, random: Random, isThere: boolean): { headers: string[]; bytes: Buffer } {
  if (!isThere) return { headers: [], bytes: body };
  const choice = random.next();
  if (choice < 0.8) return { headers: [`Content-Length: ${body.length}`], bytes: body };
  if (choice < 0.83) return { headers: [`Content-Length: ${body.length + 10}`], bytes: body };
  if (choice < 0.85) return { headers: [], bytes: body };
  const size = choice < 0.95 ? body.length.toString(16) : random.pick(['zz', 'ffffffffffffffff', '-1', '']);
  const end = random.next() < 0.9 ? '\r\n0\r\n\r\n' : random.pick(['', '\r\n0\r\n', '0', '\r\n1\r\n']);
  const start = body.length === 0 ? '' : `${size}\r\n`;
  return {
    headers: ['Transfer-Encoding: chunked'],
    bytes: Buffer.concat([Buffer.from(start), body, Buffer.from(end)]),
  };
}

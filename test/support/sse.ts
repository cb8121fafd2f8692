import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { createServer, request } from 'node:http';
import type { IncomingHttpHeaders, IncomingMessage, ServerResponse } from 'node:http';
import { connect } from 'node:net';
import type { AddressInfo } from 'node:net';
import type { Duplex } from 'node:stream';
import { setImmediate as nextTurn } from 'node:timers/promises';

const PROGRAM_TIMEOUT_MS = 110_000;

/** A request as it is sent on. */
export interface ForwardedRequest {
  method: string;
  path: string;
  headers: IncomingHttpHeaders;
}

/** What a proxy does to the event streams that go through it; everything else passes as it is. */
export interface StreamFault {
  /** Changes any request before it is sent on. */
  request?: (request: ForwardedRequest) => void;
  /** Breaks the client's connection when the server's answer begins: the n-th stream (the first is 0) loses its headers, too. */
  losesHeaders?: (stream: number) => boolean;
  /** Bytes that are sent on at once, so that lines and characters arrive in parts. Default: all that is there. */
  pieceSize?: number;
  /** Cuts the n-th stream (the first is 0) before the byte with the index that this gives; none: it passes whole. */
  cutAt?: (stream: number, received: Buffer) => number | undefined;
  /** Changes a whole stream of an execution; those of status changes have no end, and are passed on as they come. */
  rewrite?: (text: string) => string;
  /** Changes one whole event or more of a stream of status changes. */
  rewriteStatus?: (text: string) => string;
  headers?: Record<string, string>;
  /** Changes the bytes that a WebSocket brings, without changing how many they are. */
  rewriteWebSocket?: (bytes: Buffer) => Buffer;
}

export interface SseProxy {
  url: string;
  /** The requests that were answered with a stream: what they asked for, after which event, and under which key. */
  streams: { path: string; lastEventId: string | undefined; idempotencyKey: string | undefined }[];
  /** All requests that were answered, in the order of their answers. */
  answers: { method: string; path: string; status: number }[];
  close(): Promise<void>;
}

/** A proxy before a server that treats event streams badly, as networks do. */
export async function startSseProxy(target: string, fault: StreamFault): Promise<SseProxy> {
  const streams: SseProxy['streams'] = [];
  const answers: SseProxy['answers'] = [];
  const server = createServer((incoming, outgoing) => {
    const { method = '', url = '', headers } = incoming;
    const sent: ForwardedRequest = { method, path: url, headers: { ...headers } };
    fault.request?.(sent);
    const address = new URL(sent.path, target);
    const forwarded = request(address, { method: sent.method, headers: sent.headers, agent: false });
    forwarded.on('error', () => outgoing.destroy());
    forwarded.on('response', (answer) => {
      const { statusCode = 502 } = answer;
      answers.push({ method, path: url, status: statusCode });
      const isStream = answer.headers['content-type']?.startsWith('text/event-stream');
      const index = isStream ? streams.push({ path: url, ...repetitionOf(headers) }) - 1 : -1;
      if (isStream && fault.losesHeaders?.(index)) {
        answer.destroy();
        return void outgoing.destroy();
      }
      outgoing.writeHead(statusCode, { ...answer.headers, ...(isStream ? fault.headers : {}) });
      if (!isStream) return void answer.pipe(outgoing);
      outgoing.flushHeaders();
      outgoing.on('close', () => answer.destroy());
      const passed = url.includes('/events')
        ? passStatuses(answer, outgoing, fault.rewriteStatus)
        : pass(answer, outgoing, { fault, index });
      // Where one side has gone, the other one goes, too.
      passed.catch(() => outgoing.destroy());
    });
    incoming.pipe(forwarded);
  });
  const upgraded = new Set<Duplex>();
  server.on('upgrade', ({ url = '', headers }: IncomingMessage, incoming: Duplex) => {
    const { rewriteWebSocket = (bytes) => bytes } = fault;
    const { hostname, port } = new URL(target);
    const outgoing = connect({ host: hostname, port: Number(port) });
    const lines = Object.entries(headers).map(([name, value]) => `${name}: ${String(value)}\r\n`);
    outgoing.write(`GET ${url} HTTP/1.1\r\n${lines.join('')}\r\n`);
    for (const socket of [incoming, outgoing]) {
      upgraded.add(socket);
      socket.on('error', () => undefined); // its other side goes, too
      socket.on('close', () => [incoming, outgoing].forEach((each) => each.destroy()));
    }
    incoming.pipe(outgoing);
    outgoing.on('data', (bytes: Buffer) => incoming.write(rewriteWebSocket(bytes)));
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  const close = async () => {
    upgraded.forEach((socket) => socket.destroy());
    server.closeAllConnections();
    server.close();
    await once(server, 'close');
  };
  return { url: `http://127.0.0.1:${port}`, streams, answers, close };
}

/** What tells a repeated request from a new one. */
function repetitionOf(headers: IncomingHttpHeaders) {
  const [lastEventId, idempotencyKey] = ['last-event-id', 'idempotency-key'].map((name) => headers[name]);
  return { lastEventId: lastEventId?.toString(), idempotencyKey: idempotencyKey?.toString() };
}

async function pass(
  answer: IncomingMessage,
  outgoing: ServerResponse,
  { fault, index }: { fault: StreamFault; index: number },
): Promise<void> {
  const { pieceSize = Infinity, cutAt, rewrite } = fault;
  let received = Buffer.alloc(0);
  let sent = 0;
  for await (const data of answer as AsyncIterable<Buffer>) {
    received = Buffer.concat([received, data]);
    if (rewrite) continue;
    const cut = cutAt?.(index, received);
    while (sent < (cut ?? received.length)) {
      const piece = received.subarray(sent, Math.min(sent + pieceSize, cut ?? received.length));
      await new Promise((resolve) => outgoing.write(piece, resolve));
      sent += piece.length;
      await nextTurn();
    }
    if (cut !== undefined) return void outgoing.destroy();
  }
  outgoing.end(rewrite?.(received.toString()));
}

async function passStatuses(
  answer: IncomingMessage,
  outgoing: ServerResponse,
  rewrite: (text: string) => string = (text) => text,
): Promise<void> {
  let received = '';
  for await (const text of answer.setEncoding('utf8') as AsyncIterable<string>) {
    received += text;
    const end = received.lastIndexOf('\n\n') + 2;
    if (end < 2) continue;
    outgoing.write(rewrite(received.slice(0, end)));
    received = received.slice(end);
  }
  outgoing.end();
}

/** What a program printed and how it ended. */
export interface ProgramResult {
  code: number | null;
  stdout: string;
  stderr: string;
}

/** Runs a program to its end, for 50 s at most; the variables are added to those of this process. */
export async function runProgram(
  [program = '', ...args]: string[],
  {
    env = {},
    onOutput,
  }: { env?: Record<string, string>; onOutput?: (stdout: string, pid: number) => void } = {},
): Promise<ProgramResult> {
  const child = spawn(program, args, {
    env: { ...process.env, no_proxy: '127.0.0.1', ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
    // Ends before the test does, so that none outlives it.
    timeout: PROGRAM_TIMEOUT_MS,
  });
  const result: ProgramResult = { code: null, stdout: '', stderr: '' };
  child.stdout.setEncoding('utf8').on('data', (text: string) => {
    result.stdout += text;
    onOutput?.(result.stdout, child.pid ?? 0);
  });
  child.stderr.setEncoding('utf8').on('data', (text: string) => (result.stderr += text));
  [result.code] = (await once(child, 'close')) as [number | null];
  return result;
}

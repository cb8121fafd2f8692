import { connect } from 'node:net';

/** What came back on a connection. */
export interface Exchange {
  /** 0: nothing did. */
  status: number;
  contentType: string;
  body: string;
  /** `closed` by the server; `streaming`: an event stream, whose rest was not waited for. */
  end: 'closed' | 'streaming' | 'hanging';
}

/**
 * Sends these bytes on a connection of its own, and reads until the server closes it or an event stream has begun; it hangs
 * after `boundMs`. With `half` this end is closed after the last byte.
 */
export function exchange(
  url: string,
  bytes: Buffer,
  { boundMs, half }: { boundMs: number; half: boolean },
): Promise<Exchange> {
  return new Promise((done) => {
    const socket = connect({ port: Number(new URL(url).port), host: '127.0.0.1', allowHalfOpen: true });
    let received = Buffer.alloc(0);
    const finish = (end: Exchange['end']) => {
      clearTimeout(timer);
      socket.destroy();
      done({ ...parse(received), end });
    };
    const timer = setTimeout(() => finish('hanging'), boundMs);
    socket.on('connect', () => {
      if (half) socket.end(bytes);
      else socket.write(bytes);
    });
    socket.on('data', (piece: Buffer) => {
      received = Buffer.concat([received, piece]);
      if (parse(received).contentType.startsWith('text/event-stream')) finish('streaming');
    });
    socket.on('error', () => undefined); // the end comes right after
    socket.on('end', () => finish('closed'));
    socket.on('close', () => finish('closed'));
  });
}

function headOf(received: Buffer): string {
  const end = received.indexOf('\r\n\r\n');
  return end < 0 ? '' : received.toString('latin1', 0, end);
}

/** The first final answer (RFC 9112). */
function parse(received: Buffer): Omit<Exchange, 'end'> {
  let rest = received;
  let head = headOf(rest);
  while (/^HTTP\/1\.1 1\d\d/.test(head)) {
    rest = rest.subarray(head.length + 4);
    head = headOf(rest);
  }
  const header = (name: string) => new RegExp(`^${name}: (.*)$`, 'im').exec(head)?.[1]?.trim() ?? '';
  const content = rest.subarray(head.length + 4);
  const length = header('content-length');
  const body =
    length === ''
      ? dechunk(content, header('transfer-encoding'))
      : content.toString('utf8', 0, Number(length));
  return {
    status: Number(/^HTTP\/1\.[01] (\d{3})/.exec(head)?.[1] ?? 0),
    contentType: header('content-type'),
    body,
  };
}

function dechunk(content: Buffer, encoding: string): string {
  if (encoding !== 'chunked') return content.toString('utf8');
  const pieces: Buffer[] = [];
  for (let at = 0; at < content.length;) {
    const line = content.indexOf('\r\n', at);
    const size = Number.parseInt(content.toString('latin1', at, line), 16);
    if (line < 0 || !size) break;
    pieces.push(content.subarray(line + 2, line + 2 + size));
    at = line + size + 4;
  }
  return Buffer.concat(pieces).toString('utf8');
}

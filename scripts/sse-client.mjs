/** What demo.mjs and verify.mjs need to speak to a server; a client to copy is examples/node.mjs. */

/** No answer came. */
export class UnreachableError extends Error {}

/** Sends requests to one server. */
export class Client {
  /**
   * @param {string} url `http://host:port`
   * @param {AbortSignal} signal ends what is under way
   * @param {number} timeoutMs how long an answer may take, streams included
   */
  constructor(url, signal, timeoutMs) {
    this.timeoutMs = timeoutMs;
    this.url = url.replace(/\/+$/, '');
    this.signal = signal;
    /** @type {Set<AbortController>} of answers that may be under way */
    this.limits = new Set();
    signal.addEventListener('abort', () => this.limits.forEach((limit) => limit.abort(signal.reason)));
  }

  /**
   * Sends a request, an object as JSON. Rejects with {@link UnreachableError} where there is no server.
   * @param {string} method
   * @param {string} path
   * @param {{body?: unknown, headers?: Record<string, string>}} [options]
   * @returns {Promise<Response>} its body is still to be read
   */
  async open(method, path, { body, headers = {} } = {}) {
    const json =
      body === undefined
        ? { headers }
        : {
            headers: { 'content-type': 'application/json', ...headers },
            body: typeof body === 'string' ? body : JSON.stringify(body),
          };
    try {
      return await fetch(this.url + path, { method, ...json, signal: this.limit() });
    } catch (error) {
      this.signal.throwIfAborted();
      const reason = error.cause?.code ?? error.cause?.message ?? error.message;
      throw new UnreachableError(`No answer from ${this.url} (${reason}).`, { cause: error });
    }
  }

  /** For one answer. Node.js 20 may forget a signal of `AbortSignal.any` as garbage, and the time-out with it. */
  limit() {
    const limit = new AbortController();
    this.limits.add(limit);
    setTimeout(() => {
      this.limits.delete(limit);
      limit.abort(new Error(`the answer has not ended after ${this.timeoutMs} ms`));
    }, this.timeoutMs).unref();
    if (this.signal.aborted) limit.abort(this.signal.reason);
    return limit.signal;
  }

  /**
   * Sends a request and reads its answer; `body` is the JSON of it, or its text where it is none.
   * @returns {Promise<{status: number, headers: Headers, body: any}>}
   */
  async send(method, path, options) {
    const response = await this.open(method, path, options);
    const text = await response.text();
    return { status: response.status, headers: response.headers, body: parse(text) };
  }
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text; // metrics and web pages are no JSON
  }
}

/**
 * Reads the events of a stream as they arrive.
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<{id: string, data: string}, void, void>}
 */
export async function* readEvents(body) {
  let rest = '';
  let event = { id: '', data: '' };
  for await (const text of body.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + text).split('\n');
    rest = lines.pop() ?? '';
    for (const line of lines) {
      if (line.startsWith('id: ')) event.id = line.slice(4);
      if (line.startsWith('data: ')) event.data = line.slice(6);
      if (line !== '' || event.data === '') continue;
      yield event;
      event = { id: '', data: '' };
    }
  }
}

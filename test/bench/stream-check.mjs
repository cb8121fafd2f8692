// Reads HTTP responses with event streams as cheaply as can be, and checks them: the load generator shares its core
// with PostgreSQL and the upstream.
import { CHUNKS } from './streams.mjs';

const SEQUENCE = '"sequence":';
const CONTENT = '{"type":"content"';
const TEXT = '"data":"';
/** What only the two chunks of a batch itself begin with. */
const OF_BATCH = '{"type":"status","data":{';
const ITEM = '"item_id":"';

/** One response: HTTP/1.1 in chunked coding, in it the frames of a stream. All text is latin1, as only ASCII is sent. */
export class StreamCheck {
  /** Chunks that came, by their kind. */
  frames = 0;
  content = 0;
  /** The response is complete. */
  over = false;
  /** The server closes the connection after this response. */
  closes = false;
  /** Times that the agent began again. */
  restarts = 0;
  /** What is wrong with the stream, once something is. */
  fault = undefined;

  isHeadRead = false;
  terminal = undefined;
  unread = '';
  unfinishedFrame = '';

  /**
   * @param options.tokens chunks of content in the whole stream
   * @param options.after sequence after which this response begins
   * @param options.mayRestart the agent may begin again, with all of its content
   * @param options.onText called with the text of each chunk of content
   */
  constructor({ tokens = CHUNKS, after = 0, mayRestart = false, onText } = {}) {
    this.tokens = tokens;
    this.after = after;
    this.mayRestart = mayRestart;
    this.onText = onText;
  }

  /** Takes the next bytes of the response as text. */
  read(piece) {
    const text = this.unread === '' ? piece : this.unread + piece;
    let at = this.isHeadRead ? 0 : this.readHead(text);
    while (this.isHeadRead && !this.over && this.fault === undefined) {
      const line = text.indexOf('\r\n', at);
      if (line === -1) break;
      const size = Number.parseInt(text.slice(at, line), 16);
      const end = line + 2 + size;
      if (text.length < end + 2) break;
      if (size === 0) this.finish();
      else this.readFrames(text.slice(line + 2, end));
      at = end + 2;
    }
    this.unread = text.slice(at);
  }

  /** The connection ended. */
  close(why) {
    if (!this.over) this.fault ??= `the connection ended before the stream did (${why})`;
  }

  readHead(text) {
    const end = text.indexOf('\r\n\r\n');
    if (end === -1) return 0;
    const head = text.slice(0, end);
    this.isHeadRead = true;
    this.closes = /^connection: *close/im.test(head);
    if (!head.startsWith('HTTP/1.1 200 ') || !/^transfer-encoding: *chunked/im.test(head)) {
      this.fault = `the answer was no stream: ${text.slice(0, 12)} … ${text.slice(end + 4, end + 404)}`;
    }
    return end + 4;
  }

  readFrames(piece) {
    const text = this.unfinishedFrame + piece;
    let at = 0;
    for (;;) {
      const end = text.indexOf('\n\n', at);
      if (end === -1) break;
      this.readFrame(text, at, end);
      at = end + 2;
    }
    this.unfinishedFrame = text.slice(at);
  }

  readFrame(text, begin, end) {
    let data = begin;
    while (!text.startsWith('data: ', data)) {
      data = text.indexOf('\n', data) + 1;
      if (data === 0 || data > end) return; // a comment
    }
    data += 'data: '.length;
    if (this.terminal !== undefined) this.fault ??= `a chunk came after "${this.terminal}"`;
    this.frames++;
    this.readChunk(text, data, end);
  }

  readChunk(text, data) {
    const sequence = numberAt(text, text.indexOf(SEQUENCE, data) + SEQUENCE.length);
    const expected = this.after + this.frames;
    if (sequence !== expected) this.fault ??= `sequence ${sequence} where ${expected} was to come`;
    if (text.startsWith(CONTENT, data)) this.readContent(text, data);
    else this.readStatus(jsonAt(text, data));
  }

  /** How many executions have said something. */
  get speaking() {
    return this.content > 0 ? 1 : 0;
  }

  readContent(text, data) {
    this.content++;
    if (this.onText === undefined) return;
    const begin = text.indexOf(TEXT, data) + TEXT.length;
    this.onText(text.slice(begin, text.indexOf('"', begin)));
  }

  readStatus({ status, error }) {
    if (status === 'restarted' && this.mayRestart) {
      this.restarts++;
      this.content = 0;
      return;
    }
    if (status === 'started') {
      if (this.after + this.frames !== 1) this.fault ??= '"started" was not the first chunk';
      return;
    }
    this.terminal = status;
    if (status !== 'completed') this.fault ??= `the stream ended as "${status}": ${error}`;
    const expected = this.tokens - Math.max(0, this.after - 1);
    if (this.content !== expected) this.fault ??= `${this.content} chunks of content in place of ${expected}`;
  }

  finish() {
    this.over = true;
    if (this.terminal === undefined) this.fault ??= `no terminal chunk after ${this.frames} chunks`;
    if (this.unfinishedFrame !== '') this.fault ??= 'the last frame has no end';
  }
}

/** The merged stream of a batch whose items have no names: each item is checked like a stream of its own. */
export class BatchCheck extends StreamCheck {
  speaking = 0;
  ended = 0;

  /** @param options.items how many there are, `tokens` in each of them */
  constructor({ tokens, items }) {
    super({ tokens });
    this.items = items;
    this.sequences = new Int32Array(items);
    this.contents = new Int32Array(items);
  }

  readChunk(text, data, end) {
    const position = numberAt(text, text.lastIndexOf(':', end) + 1);
    if (position !== this.frames) this.fault ??= `event ${position} where ${this.frames} was to come`;
    if (text.startsWith(OF_BATCH, data)) return this.readOwn(jsonAt(text, data));
    const begin = text.indexOf(ITEM, data) + ITEM.length;
    const item = numberAt(text, begin);
    const sequence = numberAt(text, text.indexOf(SEQUENCE, begin) + SEQUENCE.length);
    const expected = ++this.sequences[item];
    if (sequence !== expected) {
      this.fault ??= `sequence ${sequence} of an item where ${expected} was to come`;
    }
    if (!text.startsWith(CONTENT, data)) return this.readEnd(jsonAt(text, data), item);
    this.content++;
    if (++this.contents[item] === 1) this.speaking++;
  }

  readOwn({ status, sequence }) {
    if (sequence === 1 && this.frames === 1) return;
    this.terminal = status;
    if (status !== 'completed') this.fault ??= `the batch ended as "${status}"`;
    if (this.ended !== this.items) this.fault ??= `${this.ended} items ended in place of ${this.items}`;
  }

  readEnd({ status, sequence }, item) {
    if (status === 'started' && sequence === 1) return;
    this.ended++;
    if (status !== 'completed') this.fault ??= `an item ended as "${status}"`;
    const content = this.contents[item];
    if (content !== this.tokens) {
      this.fault ??= `${content} chunks of content of an item in place of ${this.tokens}`;
    }
  }
}

function numberAt(text, digit) {
  let number = 0;
  for (let code = text.charCodeAt(digit); code >= 48 && code <= 57; code = text.charCodeAt(++digit)) {
    number = number * 10 + code - 48;
  }
  return number;
}

/** The rest of a line. */
function jsonAt(text, begin) {
  return JSON.parse(text.slice(begin, text.indexOf('\n', begin)));
}

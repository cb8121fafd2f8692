/** Control characters that JSON writes with two characters: `\b`, `\t`, `\n`, `\f` and `\r`. */
const SHORT_ESCAPES = [0x08, 0x09, 0x0a, 0x0c, 0x0d];

/** Cuts a text between code points, so that each piece takes `mostBytes` at most in a chunk's JSON. The pieces joined are the text. */
export function cutText(text: string, mostBytes: number): string[] {
  const pieces: string[] = [];
  let start = 0;
  let bytes = 0;
  for (let at = 0; at < text.length;) {
    const isPair = isPairAt(text, at);
    const more = isPair ? 4 : bytesOf(text.charCodeAt(at));
    if (bytes + more > mostBytes && at > start) {
      pieces.push(text.slice(start, at));
      start = at;
      bytes = 0;
    }
    bytes += more;
    at += isPair ? 2 : 1;
  }
  pieces.push(text.slice(start));
  return pieces;
}

/** A text in pieces of `length` code units or one less, cut between code points. */
export function* slicesOf(text: string, length: number): Generator<string, void, void> {
  for (let start = 0; start < text.length;) {
    const end = start + length;
    const cut = isPairAt(text, end - 1) ? end - 1 : end;
    yield text.slice(start, cut);
    start = cut;
  }
}

function isPairAt(text: string, at: number): boolean {
  const [high, low] = [text.charCodeAt(at), text.charCodeAt(at + 1)];
  return high >= 0xd800 && high <= 0xdbff && low >= 0xdc00 && low <= 0xdfff;
}

/** UTF-8 bytes of a text in the JSON of a stream, without its quotes. `JSON.stringify` needs as many at most. */
export function jsonBytes(text: string): number {
  let bytes = 0;
  for (let at = 0; at < text.length; at++) {
    const unit = text.charCodeAt(at);
    if (unit >= 0x20 && unit < 0x7f && unit !== 0x22 && unit !== 0x5c) {
      bytes += 1; // almost all that is said, and it may be millions of characters
    } else if (isPairAt(text, at)) {
      bytes += 4;
      at += 1;
    } else {
      bytes += bytesOf(unit);
    }
  }
  return bytes;
}

/** UTF-8 bytes of a code unit as the lines of streams have it; six where it is escaped. */
function bytesOf(unit: number): number {
  if (unit < 0x80) {
    if (unit >= 0x20) return unit === 0x22 || unit === 0x5c ? 2 : 1;
    return SHORT_ESCAPES.includes(unit) ? 2 : 6;
  }
  if (unit < 0x800) return unit === 0x85 ? 6 : 2;
  const isEscaped = unit === 0x2028 || unit === 0x2029 || (unit >= 0xd800 && unit <= 0xdfff);
  return isEscaped ? 6 : 3;
}

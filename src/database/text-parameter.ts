import { setImmediate as nextTurn } from 'node:timers/promises';
import { jsonBytes, slicesOf } from '../json-text.js';

/** Characters of a text whose JSON is made in one turn of the event loop. */
const TURN_CHARACTERS = 128 * 1024;

/** A parameter of a statement whose type is `text` or `json`: pg sends bytes as they are. */
export type TextParameter = string | Buffer;

/**
 * Separates JSON texts of different rows in one text parameter (`string_to_array($n, E'\\x1e')`): escaping an array of
 * texts costs more than the statement. JSON never contains it unescaped.
 */
export const ROW_SEPARATOR = '\u001e';

/**
 * The JSON of a text. That of a long one comes as bytes of UTF-8, and in many turns of the event loop: in one, 16 Mi control
 * characters would keep everybody else waiting for half a second.
 */
export function jsonOf(text: string): TextParameter | Promise<Buffer> {
  return text.length <= TURN_CHARACTERS ? JSON.stringify(text) : jsonInTurns(text);
}

/** The texts of several rows as one parameter. */
export function joinRows(texts: TextParameter[]): TextParameter {
  const [first = '', ...others] = texts;
  if (others.length === 0) return first;
  if (texts.every((text) => typeof text === 'string')) return texts.join(ROW_SEPARATOR);
  const parts = texts.flatMap((text) => [ROW_SEPARATOR, text]).slice(1);
  return Buffer.concat(parts.map((part) => (typeof part === 'string' ? Buffer.from(part) : part)));
}

async function jsonInTurns(text: string): Promise<Buffer> {
  let most = 2;
  for (const slice of slicesOf(text, TURN_CHARACTERS)) {
    most += jsonBytes(slice);
    await nextTurn();
  }
  const json = Buffer.allocUnsafeSlow(most);
  let end = json.write('"');
  for (const slice of slicesOf(text, TURN_CHARACTERS)) {
    end += json.write(JSON.stringify(slice).slice(1, -1), end);
    await nextTurn();
  }
  end += json.write('"', end);
  return json.subarray(0, end);
}

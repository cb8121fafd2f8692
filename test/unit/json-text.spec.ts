import { describe, expect, it } from '@jest/globals';
import fc from 'fast-check';
import { cutText, jsonBytes, slicesOf } from '../../src/json-text.js';
import { toJson } from '../../src/event-log/chunk.js';

/** Characters of every length in JSON, pairs and lone surrogates among them. */
const characters = fc.constantFrom(
  'a',
  '"',
  '\n',
  '\u0001',
  'é',
  '\u0085',
  '\u2028',
  '€',
  '😀',
  '\ud83d',
  '\ude00',
);
const texts = fc.oneof(
  fc.array(characters, { maxLength: 200 }).map((list) => list.join('')),
  fc.string({ unit: 'binary', maxLength: 200 }),
);
const splitsNoPair = (pieces: string[]) =>
  pieces.every(
    (piece, index) => !(/[\ud800-\udbff]$/.test(piece) && /^[\udc00-\udfff]/.test(pieces[index + 1] ?? '')),
  );

it('counts the bytes that a text takes in the JSON of a stream', () => {
  fc.assert(
    fc.property(texts, (text) => {
      expect(jsonBytes(text)).toBe(Buffer.byteLength(toJson(text)) - 2);
    }),
  );
});

describe('a text that is cut', () => {
  it('fits into its lines, and is the same again when they are joined', () => {
    fc.assert(
      fc.property(texts, fc.integer({ min: 6, max: 60 }), (text, most) => {
        const pieces = cutText(text, most);
        expect(pieces.join('')).toBe(text);
        for (const piece of pieces) expect(Buffer.byteLength(toJson(piece)) - 2).toBeLessThanOrEqual(most);
        expect(splitsNoPair(pieces)).toBe(true);
      }),
    );
  });

  it('comes in slices that are joined the same, none of which is longer', () => {
    fc.assert(
      fc.property(texts, fc.integer({ min: 2, max: 30 }), (text, length) => {
        const slices = [...slicesOf(text, length)];
        expect(slices.join('')).toBe(text);
        for (const slice of slices) expect(slice.length).toBeLessThanOrEqual(length);
        expect(splitsNoPair(slices)).toBe(true);
      }),
    );
  });
});

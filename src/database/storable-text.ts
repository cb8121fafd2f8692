/** Characters of an error's text at most: it goes into one line of a stream, and into statements that others share. */
const MOST_CHARACTERS = 4000;

/** An error's text as a column of type `text` can hold it, which refuses U+0000, and not longer than a reader needs. */
export function storableText(text: string): string {
  const short = text.length <= MOST_CHARACTERS ? text : `${text.slice(0, MOST_CHARACTERS - 1)}…`;
  return short.replaceAll('\u0000', '\ufffd');
}

import { MOST_LINE_BYTES } from '../line-limit.js';
import type { BatchData, ChunkContent, ChunkSerializer } from './chunk.js';

/** UTF-16 code units that fit into a line whatever they are, beside the names and ids of a chunk. */
export const SHORT_TEXT = 4096;

/** A batch's own chunk; its items are left out where their list would make the line too long. */
export function serializeBatchChunk(
  serializer: ChunkSerializer,
  { data, ...content }: Omit<ChunkContent, 'data'> & { data: BatchData },
  { sequence, time }: { sequence: number; time: number },
): string {
  const line = serializer.serialize({ ...content, data }, sequence, time);
  if (Buffer.byteLength(line) <= MOST_LINE_BYTES) return line;
  const { items: _items, ...rest } = data;
  return serializer.serialize({ ...content, data: { ...rest, items_omitted: true } }, sequence, time);
}

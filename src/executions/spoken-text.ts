import type { HeldOutput } from '../engine/output-memory.js';
import type { Chunk } from '../event-log/chunk.js';
import type { LogBatch } from '../event-log/event-log.js';

/** UTF-16 code units that are kept: as much as an execution may say. */
const MOST_CHARACTERS = 64 * 1024 * 1024;

/** What a piece costs in memory besides its characters. */
const PIECE_BYTES = 48;

interface Piece {
  sequence: number;
  text: string;
}

/**
 * What the answering agents said, as a client that read the log has it: without what `restarted` chunks took back, joined as
 * the `response` of a finished execution is. Agents that are not in `order` come last. It waits for room in `held`, which holds the text then.
 */
export async function spokenText(
  log: AsyncIterable<LogBatch>,
  { order, held }: { order: string[]; held: HeldOutput },
): Promise<string> {
  const pieces = new Map<string, Piece[]>(order.map((agentId) => [agentId, []]));
  let characters = 0;
  for await (const { chunks } of log) {
    for (const line of chunks) {
      const chunk = JSON.parse(line) as Chunk;
      const { type, data, status, agent_id = '', discard_after = 0, sequence } = chunk;
      if (type === 'content' && typeof data === 'string') {
        characters += data.length;
        await held.take(data.length + PIECE_BYTES);
        const said = pieces.get(agent_id) ?? [];
        said.push({ sequence, text: data });
        pieces.set(agent_id, said);
      } else if (status === 'restarted') {
        const said = pieces.get(agent_id) ?? [];
        const kept = said.filter((piece) => piece.sequence <= discard_after);
        held.remove(bytesOf(said) - bytesOf(kept));
        pieces.set(agent_id, kept);
      }
    }
    if (characters > MOST_CHARACTERS) break;
  }
  return [...pieces.values()]
    .map((said) => said.map(({ text }) => text).join(''))
    .filter((text) => text !== '')
    .join('\n\n');
}

function bytesOf(pieces: Piece[]): number {
  return pieces.reduce((sum, { text }) => sum + text.length + PIECE_BYTES, 0);
}

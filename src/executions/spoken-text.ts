import type { Chunk } from '../event-log/chunk.js';
import type { LogBatch } from '../event-log/event-log.js';

/** UTF-16 code units that are kept: as much as an execution may say. */
const MOST_CHARACTERS = 64 * 1024 * 1024;

interface Piece {
  sequence: number;
  text: string;
}

/**
 * What the answering agents said, as a client that read the log has it: without what `restarted` chunks took back, joined as
 * the `response` of a finished execution is. Agents that are not in `order` come last.
 */
export async function spokenText(log: AsyncIterable<LogBatch>, order: string[]): Promise<string> {
  const pieces = new Map<string, Piece[]>(order.map((agentId) => [agentId, []]));
  let characters = 0;
  for await (const { chunks } of log) {
    for (const line of chunks) {
      const chunk = JSON.parse(line) as Chunk;
      const { type, data, status, agent_id = '', discard_after = 0, sequence } = chunk;
      if (type === 'content' && typeof data === 'string') {
        characters += data.length;
        const said = pieces.get(agent_id) ?? [];
        said.push({ sequence, text: data });
        pieces.set(agent_id, said);
      } else if (status === 'restarted') {
        const said = pieces.get(agent_id) ?? [];
        pieces.set(
          agent_id,
          said.filter((piece) => piece.sequence <= discard_after),
        );
      }
    }
    if (characters > MOST_CHARACTERS) break;
  }
  return [...pieces.values()]
    .map((said) => said.map(({ text }) => text).join(''))
    .filter((text) => text !== '')
    .join('\n\n');
}

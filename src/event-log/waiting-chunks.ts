import type { LogBatch } from './event-log.js';
import { trim } from './log-batch.js';
import type { Range } from './merged-order.js';

/** Characters that are kept at most. */
const MOST_CHARACTERS = 512 * 1024;

/** Chunks that this process has committed, kept until they are merged, so that its readers need not read them again. */
export class WaitingChunks {
  private readonly byMember = new Map<number, { batch: LogBatch; characters: number }[]>();
  private characters = 0;

  /** A batch that does not fit is left to the stored rows. */
  keep(member: number, batch: LogBatch, characters: number): void {
    if (this.characters + characters > MOST_CHARACTERS) return;
    const kept = this.byMember.get(member);
    if (kept) kept.push({ batch, characters });
    else this.byMember.set(member, [{ batch, characters }]);
    this.characters += characters;
  }

  /** The chunks of some ranges, one after the other; undefined if any is missing. */
  find(ranges: Range[]): string[] | undefined {
    const all: string[] = [];
    for (const { member, first, last } of ranges) {
      let next = first;
      for (const { batch } of this.byMember.get(member) ?? []) {
        if (batch.last < next) continue;
        if (batch.first > next || next > last) break;
        const chunks = trim(batch, next - 1).chunks.slice(0, last + 1 - next);
        all.push(...chunks);
        next += chunks.length;
      }
      if (next <= last) return undefined;
    }
    return all;
  }

  /** Lets go of what a member has logged up to `last`. */
  drop(member: number, last: number): void {
    const kept = this.byMember.get(member);
    if (!kept) return;
    while (kept[0] && kept[0].batch.last <= last) this.characters -= kept.shift()?.characters ?? 0;
    if (kept.length === 0) this.byMember.delete(member);
  }
}

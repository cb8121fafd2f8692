import { setImmediate as nextTurn } from 'node:timers/promises';

/** After so much work in one turn of the event loop, ms, the rest waits for the next one, so that others come by. */
const TURN_MS = 10;

/** Work that is done piece by piece, between which others may come by, and its result. */
export type Pieces<Result> = Generator<void, Result>;

export function atOnce<Result>(pieces: Pieces<Result>): Result {
  for (;;) {
    const piece = pieces.next();
    if (piece.done) return piece.value;
  }
}

/** @param turn asked before each piece whether to wait */
export async function inTurns<Result>(
  pieces: Pieces<Result>,
  turn: () => Promise<void> | undefined,
): Promise<Result> {
  for (;;) {
    await turn();
    const piece = pieces.next();
    if (piece.done) return piece.value;
  }
}

/** Shares out the turns of the event loop among those who work on it in small pieces: one instance a process. */
export class Turns {
  private begun: number | undefined;

  /** To be asked before a piece of work: undefined to begin at once, or a promise for when this turn has had enough. */
  wait(): Promise<void> | undefined {
    if (this.begun === undefined) {
      this.begun = performance.now();
      setImmediate(() => (this.begun = undefined));
      return undefined;
    }
    return performance.now() - this.begun < TURN_MS ? undefined : this.waitLonger();
  }

  private async waitLonger(): Promise<void> {
    // Those who waited before have perhaps used up the next turn, too.
    do await nextTurn();
    while (this.begun !== undefined && performance.now() - this.begun >= TURN_MS);
  }
}

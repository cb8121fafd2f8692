import { it } from '@jest/globals';

const effort = process.env.EFFORT ?? 'quick';
if (effort !== 'quick' && effort !== 'full') throw new Error(`EFFORT=${effort} is neither quick nor full.`);

/** Whether tests do all that they can: `npm run test:all` sets `EFFORT=full`, and without it they are quick. */
export const IS_FULL = effort === 'full';

/** How often, how many, how large or how long: the full figure where {@link IS_FULL}, the quick one otherwise. */
export function rounds(full: number, quick: number): number {
  return IS_FULL ? full : quick;
}

/** Those of a list that are dear are left out unless {@link IS_FULL}. */
export function cheap<Item extends object>(all: readonly (Item & { isDear?: boolean })[]): Item[] {
  return all.filter(({ isDear }) => IS_FULL || !isDear);
}

/** A test that has no smaller form, or a dear neighbour of one that always runs: it is skipped unless {@link IS_FULL}. */
export const itInFull: typeof it = IS_FULL ? it : (it.skip as typeof it);

import { randomInt } from 'node:crypto';

/** One seed for the whole run, whatever processes Jest makes of it. */
export default function chaosSetup() {
  process.env.CHAOS_SEED ??= String(randomInt(2 ** 31 - 1));
}

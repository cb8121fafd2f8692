import { Client } from 'pg';
import { inconclusive } from './inconclusive.js';

/** ms that one measure takes on an idle machine of two cores. */
export const NOMINAL_MS = 30;
/** A machine this many times slower, or one that has changed its pace by as much meanwhile, is none to measure times on. */
const STEADY = 3;
const ROUND_TRIPS = 40;
const PARSED = JSON.stringify(Array.from({ length: 2000 }, (_, id) => ({ id, text: `item ${id}` })));

/**
 * What a time is worth on this machine at this moment: how much longer than on an idle one a known piece of work takes, which
 * is half computing and half round trips to the database. A test whose promise is a time lays it first.
 */
export class Yardstick {
  /** @param measure ms of the known piece of work now */
  constructor(
    private readonly measure: () => Promise<number>,
    private readonly before: number,
  ) {}

  /** @param databaseUrl by default the PostgreSQL of the run */
  static async lay(databaseUrl = process.env.TEST_DATABASE_URL ?? ''): Promise<Yardstick> {
    const measureNow = () => measure(databaseUrl);
    return new Yardstick(measureNow, await measureNow());
  }

  /**
   * Expects of a time that it is at most `limitMs` on an idle machine. What takes longer than the yardstick allows fails. It is
   * inconclusive where the machine was not steady meanwhile, and that alone can be the reason.
   *
   * @param ms without what was meant to be waited for
   */
  async expectAtMost(ms: number, limitMs: number, what: string): Promise<void> {
    if (ms <= limitMs) return;
    const after = await this.measure();
    const [least, most] = [Math.min(this.before, after), Math.max(this.before, after)];
    const slower = Math.max(1, most / NOMINAL_MS);
    if (ms <= limitMs * slower) return;
    const measured = `${what} took ${Math.round(ms)} ms of ${limitMs}, on a machine ${slower.toFixed(1)} times slower than an idle one`;
    const isSteady = slower <= STEADY && most / least <= STEADY;
    if (isSteady || ms > limitMs * slower * STEADY) throw new Error(measured);
    inconclusive(`${measured}, and not steady`);
  }
}

/** ms of the known piece of work. */
async function measure(connectionString: string): Promise<number> {
  const client = new Client({ connectionString });
  await client.connect();
  try {
    await client.query('SELECT 1');
    const begun = performance.now();
    for (let trip = 0; trip < ROUND_TRIPS; trip++) {
      await client.query('SELECT 1');
      JSON.parse(PARSED);
    }
    return performance.now() - begun;
  } finally {
    await client.end();
  }
}

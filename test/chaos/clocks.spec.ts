import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { Chaos, START_MS } from '../support/chaos.js';
import { expectWhole } from '../support/chaos-checks.js';

const PIECES = 4;
const KILLS = 4;

let chaos: Chaos;
let deployment: string;

beforeAll(async () => {
  const preload = new URL('../support/wrong-clock.mjs', import.meta.url).href;
  chaos = await Chaos.start({
    workers: 3,
    env: { NODE_OPTIONS: `--import=${preload}`, MAX_LOST_ATTEMPTS: '50' },
  });
  deployment = await chaos.studio().deploy({ agents: [chaos.ledger.agent('a', PIECES, 10)] });
}, START_MS);
afterAll(() => chaos?.stop(), START_MS);

describe('workers whose clocks are wrong by an hour, some ahead and some behind', () => {
  it('take over what a killed one had, each time, and from no living one anything', async () => {
    await chaos.reporting(async () => {
      const { ledger } = chaos;
      const marker = chaos.marker('moving');
      const still = chaos.marker('still');
      for (const held of [marker, still]) ledger.hold(held);
      const run = chaos.client(deployment, marker).stream();
      const other = chaos.client(deployment, still).stream();
      const keeper = await chaos.callerOf(await ledger.call(still, 1));
      let kills = 0;
      for (let call = 1; kills < KILLS; call++) {
        const worker = await chaos.callerOf(await ledger.call(marker, call));
        if (worker === keeper) break; // killing it would take the other one, too
        worker.kill('SIGKILL');
        kills++;
      }
      expect(ledger.of(still)).toHaveLength(1);
      for (const held of [marker, still]) ledger.letGo(held);
      const speakers = () => [{ agent_id: 'a', pieces: PIECES }];
      await expectWhole(chaos, await Promise.all([run, other]), { speakers });
      if (kills === 0) {
        keeper.kill('SIGKILL');
        await chaos.client(deployment).stream();
      }
    });
  }, 120_000);
});

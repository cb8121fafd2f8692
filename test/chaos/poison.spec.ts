import { afterAll, beforeAll, describe, expect, it } from '@jest/globals';
import { Chaos, PATIENCE_MS, START_MS } from '../support/chaos.js';
import { expectWhole } from '../support/chaos-checks.js';
import { faultsOfStream, until } from '../support/studio.js';

/** From its second loss on an execution is a suspect. */
const UNSUSPECTED_LOSSES = 2;
const MOST_LOSSES = 2;
const PIECES = 4;

let chaos: Chaos;
let deployment: string;

beforeAll(async () => {
  chaos = await Chaos.start({ api: 1, env: { MAX_LOST_ATTEMPTS: String(MOST_LOSSES) } });
  deployment = await chaos.studio().deploy({ agents: [chaos.ledger.agent('a', PIECES, 10)] });
}, START_MS);
afterAll(() => chaos?.stop(), START_MS);

const speakers = () => [{ agent_id: 'a', pieces: PIECES }];

/** Kills each worker that takes up this execution, so many times; the supervisor starts them again. */
async function poison(marker: string, losses: number): Promise<void> {
  for (let loss = 1; loss <= losses; loss++) {
    const worker = await chaos.callerOf(await chaos.ledger.call(marker, loss));
    worker.kill('SIGKILL');
  }
}

describe('an execution that kills each worker', () => {
  it('ends as `worker_lost` after so many, and others go on', async () => {
    await chaos.reporting(async () => {
      const { ledger } = chaos;
      const marker = chaos.marker('poison');
      ledger.hold(marker);
      const poisoned = chaos.client(deployment, marker).stream();
      await poison(marker, UNSUSPECTED_LOSSES + MOST_LOSSES);
      const bystanders = await Promise.all(
        Array.from({ length: 10 }, () => chaos.client(deployment).stream()),
      );
      const { frames, executionId } = await poisoned;
      expect(faultsOfStream(frames, executionId)).toEqual([]);
      expect(frames.at(-1)?.chunk).toMatchObject({ status: 'error', code: 'worker_lost' });
      expect(await chaos.rows([executionId])).toMatchObject([{ status: 'error', code: 'worker_lost' }]);
      expect(ledger.of(marker)).toHaveLength(UNSUSPECTED_LOSSES + MOST_LOSSES);
      await expectWhole(chaos, bystanders, { speakers });
    });
  }, 120_000);

  it('is given up, and none of those that lost their worker with it each time', async () => {
    await chaos.reporting(async () => {
      const { ledger } = chaos;
      const marker = chaos.marker('poison');
      ledger.hold(marker);
      // They wait for their models until they are suspects themselves, so that each loss may be theirs, too.
      const innocents = Array.from({ length: 4 }, () => chaos.marker('innocent'));
      innocents.forEach((innocent) => ledger.hold(innocent));
      const poisoned = chaos.client(deployment, marker).stream();
      const runs = innocents.map((innocent) => chaos.client(deployment, innocent).stream());
      let isOver = false;
      const given = poisoned.finally(() => (isOver = true));
      const nextCall = (loss: number) => {
        if (loss > UNSUSPECTED_LOSSES) innocents.forEach((innocent) => ledger.letGo(innocent));
        return isOver ? 'over' : ledger.of(marker)[loss - 1];
      };
      for (let loss = 1; !isOver; loss++) {
        const call = await until(() => nextCall(loss), PATIENCE_MS);
        if (call === 'over') break;
        (await chaos.callerOf(call)).kill('SIGKILL');
      }
      const { frames } = await given;
      expect(frames.at(-1)?.chunk).toMatchObject({ status: 'error', code: 'worker_lost' });
      const ended = await Promise.all(runs);
      await expectWhole(chaos, ended, { speakers });
      const rows = await chaos.rows(ended.map(({ executionId }) => executionId));
      expect(rows.map(({ counted_losses }) => counted_losses)).toEqual(rows.map(() => 0));
      expect(rows.some(({ losses }) => losses > 0)).toBe(true);
    });
  }, 120_000);
});

import { afterAll, beforeAll, expect, it } from '@jest/globals';
import { Chaos, PATIENCE_MS, describeChaos } from '../support/chaos.js';
import { expectWhole } from '../support/chaos-checks.js';
import { faultsOfStream } from '../support/studio.js';

const MOST_LOSSES = 3;
const PIECES = 4;

let chaos: Chaos;

beforeAll(async () => {
  chaos = await Chaos.start({ api: 1, env: { MAX_LOST_ATTEMPTS: String(MOST_LOSSES) } });
}, PATIENCE_MS);
afterAll(() => chaos?.stop(), PATIENCE_MS);

describeChaos('an execution that kills each worker', () => {
  it('ends as `worker_lost` after so many, and others go on', async () => {
    await chaos.reporting(async () => {
      const { ledger } = chaos;
      const deployment = await chaos.studio().deploy({ agents: [ledger.agent('a', PIECES, 10)] });
      const marker = chaos.marker('poison');
      ledger.hold(marker);
      const poisoned = chaos.client(deployment, marker).stream();
      for (let loss = 1; loss <= MOST_LOSSES; loss++) {
        const worker = await chaos.callerOf(await ledger.call(marker, loss));
        worker.kill('SIGKILL'); // its supervisor starts it again
      }
      const bystanders = await Promise.all(
        Array.from({ length: 10 }, () => chaos.client(deployment).stream()),
      );
      const { frames, executionId } = await poisoned;
      expect(faultsOfStream(frames, executionId)).toEqual([]);
      expect(frames.at(-1)?.chunk).toMatchObject({ status: 'error', code: 'worker_lost' });
      expect(await chaos.rows([executionId])).toMatchObject([{ status: 'error', code: 'worker_lost' }]);
      expect(ledger.of(marker)).toHaveLength(MOST_LOSSES);
      const speakers = [{ agent_id: 'a', pieces: PIECES }];
      await expectWhole(chaos, bystanders, { speakers: () => speakers });
    });
  }, 120_000);
});

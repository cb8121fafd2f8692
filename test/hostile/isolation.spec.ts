import { describe, expect, it } from '@jest/globals';
import { expectUnharmed, withBystander } from '../support/bystander.js';
import { cheap } from '../support/effort.js';
import { Studio } from '../support/studio.js';
import type { ServerProcess } from '../support/studio-process.js';
import type { UpstreamAnswer } from '../support/upstream.js';
import { withProcesses } from '../support/with-processes.js';
import { ATTACKS } from './attacks.js';

let answer: UpstreamAnswer = (response) => response.end();
const system = withProcesses({
  upstream: (response, request) => answer(response, request),
  // Less than the default, for an attack in a few seconds, beside which another file's tests run.
  env: { MAX_EXECUTION_OUTPUT: String(2 ** 24) },
});
let server: ServerProcess | undefined;

describe('another client loses nothing and waits for nobody while somebody sends', () => {
  it.each(cheap(ATTACKS))(
    '$name',
    async ({ run, ends }) => {
      // What a failed attack has left behind would hide what this one does.
      const target = server?.lives ? server : (server = await system.start());
      const { database } = system;
      const witness = await withBystander(target, () =>
        run({
          server: target,
          studio: new Studio(target.url),
          database,
          serve: (next) => void (answer = next),
        }),
      ).catch(async (error: unknown) => {
        server = undefined;
        await target.stop('SIGKILL');
        throw error;
      });
      const others = witness.outcome.filter((end) => !ends.includes(end));
      expect(others).toEqual([]);
      expectUnharmed(witness);
    },
    120_000,
  );
});

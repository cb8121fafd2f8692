import { expect, it } from '@jest/globals';
import { graphOf, nested, pairs } from '../support/hostile-bodies.js';
import { Studio } from '../support/studio.js';
import { withProcesses } from '../support/with-processes.js';
import { Yardstick } from '../support/yardstick.js';

/** A server that answers nothing for so long stands still; ordinary answers take a thousandth of it. */
const STALL_MS = 5000;
const SLOW_TEMPLATE = '{% for i in (1..9999999) %}{% for j in (1..9999999) %}{% endfor %}{% endfor %}';

// A test can't see its own process stand still.
const system = withProcesses();

it('nothing that is sent holds up the server for the others', async () => {
  const yardstick = await Yardstick.lay();
  const outside = await system.start();
  const client = new Studio(outside.url);
  const send = (body: unknown, path = '/api/workflows') => client.json(path, { method: 'POST', body });
  const slow = await client.deploy({
    agents: [{ agent_id: 'a', agent_type: 'template', config: { template: SLOW_TEMPLATE } }],
  });
  const deciding = await client.deploy({
    ...graphOf(2, []).configuration,
    connections: [
      {
        source_agent_id: 'a0',
        target_agent_id: 'a1',
        connection_type: 'conditional',
        conditions: { expression: 'query.matches("^(a+)+$")' },
      },
    ],
  });
  const runs = [slow, deciding].map((deployment_name) => ({
    deployment_name,
    query: `${'a'.repeat(40)}!`,
  }));
  let answered = false;
  const hostile = Promise.all([
    ...runs.map((body) => send(body, '/api/workflows/execute')),
    send(
      graphOf(
        45,
        pairs(45, (source, target) => source < target),
      ),
    ),
    send(
      graphOf(
        31,
        pairs(31, (source, target) => source !== target),
      ),
    ),
    send(`{"name": "deep", "configuration": ${nested(150_000)}}`),
    send(`{"name": "wide", "configuration": {"agents": [${'[],'.repeat(300_000)}1]}}`),
    send(`{"name": "wide", "configuration": {"agents": [${'{"__proto__":1},'.repeat(60_000)}1]}}`),
    send({ name: 'faults', configuration: { agents: Array(100).fill({ agent_id: '' }), connections: [] } }),
  ]).finally(() => (answered = true));
  let longestMs = 0;
  for (let probes = 0; !answered || probes < 3; probes++) {
    const asked = performance.now();
    const answer = await fetch(`${outside.url}/health/live`);
    expect(answer.status).toBe(200);
    longestMs = Math.max(longestMs, performance.now() - asked);
  }
  const answers = await hostile;
  const statuses = answers.map(({ status }) => status);
  // What an agent may not do is an error of its run; the big graph without a cycle is a good one.
  expect(statuses).toEqual([502, 502, 201, 422, 400, 400, 400, 422]);
  await yardstick.expectAtMost(longestMs, STALL_MS, 'the slowest answer to a probe');
});

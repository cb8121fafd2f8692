import { describe, expect, it } from '@jest/globals';
import fc from 'fast-check';
import { AppError } from '../../src/errors.js';
import type { StepResult } from '../../src/engine/runner.js';
import {
  compile,
  connect,
  execute,
  fails,
  faultsOf,
  llm,
  onError,
  Recorder,
  says,
  ScriptedModels,
} from './engine-support.js';
import { rounds } from '../support/effort.js';

const RUNS = rounds(300, 60);
const seed = Date.now() % 2 ** 31;

/** Said in the report of a failure, and by `console.info` of each run, so that it can be repeated. */
console.info(`engine-properties: seed ${seed}`);

interface Plan {
  /** Whether agent `n<index>` fails. */
  failing: boolean[];
  connections: {
    source: number;
    target: number;
    kind: 'default' | 'true' | 'false' | 'error';
    priority: number;
  }[];
}

const plans: fc.Arbitrary<Plan> = fc.integer({ min: 1, max: 12 }).chain((size) => {
  const pairs = Array.from({ length: size }, (_, source) =>
    Array.from({ length: size - source - 1 }, (_unused, offset) => ({ source, target: source + offset + 1 })),
  ).flat();
  return fc.record({
    failing: fc.array(
      fc.integer({ min: 0, max: 5 }).map((n) => n === 0),
      { minLength: size, maxLength: size },
    ),
    connections: fc.subarray(pairs).chain((chosen) =>
      fc.tuple(
        ...chosen.map((pair) =>
          fc.record({
            source: fc.constant(pair.source),
            target: fc.constant(pair.target),
            kind: fc.constantFrom('default', 'true', 'false', 'error'),
            priority: fc.integer({ min: -2, max: 2 }),
          }),
        ),
      ),
    ),
  });
});

const id = (index: number) => `n${index}`;

/** The rules in their plainest form: agents in order of their numbers, every connection only leading upwards. */
function predict({ failing, connections }: Plan) {
  const statuses: StepResult['status'][] = [];
  let unhandled = false;
  failing.forEach((fails, index) => {
    const incoming = connections.filter(({ target }) => target === index);
    const isTaken = incoming.some(({ source, kind }) =>
      kind === 'error' ? statuses[source] === 'error' : kind !== 'false' && statuses[source] === 'completed',
    );
    if (incoming.length > 0 && !isTaken) statuses.push('skipped');
    else statuses.push(fails ? 'error' : 'completed');
    const handled = connections.some(({ source, kind }) => source === index && kind === 'error');
    if (statuses[index] === 'error' && !handled) unhandled = true;
  });
  return { statuses, unhandled };
}

function prepare({ failing, connections }: Plan, shuffle: number) {
  const models = new ScriptedModels({
    good: says('out', 'put'),
    bad: fails(new AppError('model_error', 'planned'), 'output'),
  });
  const agents = failing.map((fails, index) => llm(id(index), fails ? 'bad' : 'good'));
  // Rotated, so that the order of the definition is not that of the graph.
  const rotated = [...agents.slice(shuffle % agents.length), ...agents.slice(0, shuffle % agents.length)];
  const edges = connections.map(({ source, target, kind, priority }) => {
    const more = { priority, ...(kind === 'error' && { connection_type: 'error' }) };
    const condition = {
      connection_type: 'conditional',
      conditions: { expression: `output == "output" && ${kind}` },
      priority,
    };
    return connect(id(source), id(target), kind === 'true' || kind === 'false' ? condition : more);
  });
  return { models, graph: compile(rotated, edges, { models }) };
}

describe('random graphs', () => {
  it('run exactly the agents that the rules name, in an order that respects every connection', async () => {
    const seen = { completed: 0, error: 0, skipped: 0, runs: 0 };
    const property = fc.asyncProperty(plans, fc.nat(12), async (plan, shuffle) => {
      const { models, graph } = prepare(plan, shuffle);
      const observer = new Recorder();
      const outcome = await execute(graph, { models, observer });
      const { statuses, unhandled } = predict(plan);

      expect(outcome.status).toBe(unhandled ? 'error' : 'completed');
      if (!unhandled) {
        expect(observer.statuses()).toEqual(
          Object.fromEntries(statuses.map((status, index) => [id(index), status])),
        );
        const answers = [...graph.agents.keys()].filter(
          (agent_id) => observer.steps.get(agent_id)?.status === 'completed' && graph.answers(agent_id),
        );
        expect(outcome.response).toBe(answers.map(() => 'output').join('\n\n'));
        seen.runs += 1;
      }
      for (const [agent_id, { status }] of observer.steps) {
        if (status === 'cancelled') continue;
        expect([agent_id, status]).toEqual([agent_id, statuses[Number(agent_id.slice(1))]]);
        seen[status] += 1;
      }
      for (const { source, target } of plan.connections) {
        const started = observer.events.indexOf(`start ${id(target)}`);
        const ended = observer.events.findIndex(
          (event) => event.endsWith(` ${id(source)}`) && !event.startsWith('start'),
        );
        if (started !== -1) expect(ended).toBeLessThan(started);
        if (started !== -1) expect(ended).not.toBe(-1);
      }
    });
    await fc.assert(property, { seed, numRuns: RUNS });
    // Without these a generator that makes only failing or only single agents would pass.
    expect(seen.runs).toBeGreaterThan(RUNS / 10);
    expect(seen.completed).toBeGreaterThan(RUNS);
    expect(seen.skipped).toBeGreaterThan(RUNS / 10);
    expect(seen.error).toBeGreaterThan(RUNS / 10);
  });

  it('end the same when they go on from any checkpoints of an interrupted run', async () => {
    const property = fc.asyncProperty(plans, fc.nat(12), fc.nat(12), async (plan, shuffle, kept) => {
      const { models, graph } = prepare(plan, shuffle);
      const first = new Recorder();
      const whole = await execute(graph, { models, observer: first });
      fc.pre(whole.status === 'completed');

      // What is finished at any moment is a prefix of the ends in their order.
      const completed = new Map([...first.steps].slice(0, kept));
      const second = new Recorder();
      const resumed = await execute(graph, { models, observer: second, completed });
      expect(resumed).toEqual(whole);
      expect({ ...Object.fromEntries(completed), ...Object.fromEntries(second.steps) }).toEqual(
        Object.fromEntries(first.steps),
      );
      expect(second.steps.size).toBe(first.steps.size - completed.size);
    });
    await fc.assert(property, { seed, numRuns: RUNS });
  });

  it('settle when they are aborted at any moment', async () => {
    const property = fc.asyncProperty(plans, fc.nat(40), async (plan, moment) => {
      const { models, graph } = prepare(plan, 0);
      const controller = new AbortController();
      const observer = new Recorder();
      const run = execute(graph, { models, observer, signal: controller.signal });
      for (let turn = 0; turn < moment; turn += 1) await Promise.resolve();
      controller.abort();
      const outcome = await run;
      const starts = observer.events.filter((event) => event.startsWith('start ')).length;
      const ends = [...observer.steps.values()].filter(({ status }) => status !== 'skipped').length;
      expect(ends).toBe(starts);
      if (outcome.status === 'completed') expect(observer.steps.size).toBe(graph.total_steps);
      else expect(['aborted', 'error']).toContain(outcome.status);
    });
    await fc.assert(property, { seed, numRuns: RUNS });
  });

  it('are refused exactly when they have a cycle', () => {
    const graphs = fc.integer({ min: 2, max: 8 }).chain((size) =>
      fc.record({
        size: fc.constant(size),
        edges: fc.uniqueArray(fc.tuple(fc.nat(size - 1), fc.nat(size - 1)), {
          selector: ([source, target]) => `${source} ${target}`,
          maxLength: 14,
        }),
      }),
    );
    const seen = { acyclic: 0, cyclic: 0 };
    fc.assert(
      fc.property(graphs, ({ size, edges }) => {
        const proper = edges.filter(([source, target]) => source !== target);
        const agents = Array.from({ length: size }, (_, index) => llm(id(index)));
        const build = () =>
          compile(
            agents,
            proper.map(([source, target]) => connect(id(source), id(target))),
          );

        const reaches = (from: number): Set<number> => {
          const reached = new Set(proper.filter(([source]) => source === from).map(([, target]) => target));
          for (const node of reached)
            proper.forEach(([source, target]) => source === node && reached.add(target));
          return reached;
        };
        const onCycle = agents.map((_, index) => index).filter((index) => reaches(index).has(index));
        if (onCycle.length === 0) {
          expect(build().order).toHaveLength(size);
          seen.acyclic += 1;
          return;
        }
        const faults = faultsOf(build);
        const named = faults.filter(({ detail }) => detail.includes('cycle:'));
        // Every cycle that is named is one, and every agent of a group is reached from it.
        const covered = new Set<number>();
        for (const { detail } of named) {
          const path =
            detail
              .split('cycle: ')[1]
              ?.split(';')[0]
              ?.split(' -> ')
              .map((name) => Number(name.slice(1))) ?? [];
          expect(path[0]).toBe(path.at(-1));
          path.slice(1).forEach((target, index) => expect(proper).toContainEqual([path[index], target]));
          const start = path[0] ?? -1;
          onCycle
            .filter((node) => reaches(start).has(node) && reaches(node).has(start))
            .forEach((node) => covered.add(node));
        }
        expect([...covered].sort((a, b) => a - b)).toEqual(onCycle);
        const starts = agents
          .map((_, index) => index)
          .filter((index) => !proper.some(([, target]) => target === index));
        const fromStart = new Set(starts.flatMap((start) => [start, ...reaches(start)]));
        const lost = agents
          .map((_, index) => index)
          .filter((index) => !fromStart.has(index) && !onCycle.includes(index));
        expect(
          faults.filter(({ detail }) => detail.includes("can't be reached")).map(({ pointer }) => pointer),
        ).toEqual(lost.map((index) => `/configuration/agents/${index}`));
        seen.cyclic += 1;
      }),
      { seed, numRuns: RUNS },
    );
    expect(seen.acyclic).toBeGreaterThan(RUNS / 20);
    expect(seen.cyclic).toBeGreaterThan(RUNS / 20);
  });

  it('with error connections only are handled by each of them', async () => {
    const models = new ScriptedModels({
      bad: fails(new AppError('model_error', 'planned')),
      good: says('x'),
    });
    const graph = compile(
      [llm('a', 'bad'), llm('b', 'good'), llm('c', 'good')],
      [onError('a', 'b'), onError('a', 'c')],
      { models },
    );
    expect((await execute(graph, { models })).response).toBe('x\n\nx');
  });
});

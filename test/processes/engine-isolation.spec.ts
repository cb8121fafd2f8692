import { execFile } from 'node:child_process';
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { promisify } from 'node:util';
import { describe, expect, it } from '@jest/globals';
import { compileGraph, compileGraphInTurns, type Graph } from '../../src/engine/graph.js';
import { Turns } from '../../src/engine/turns.js';
import { Yardstick } from '../support/yardstick.js';
import {
  compile,
  connect,
  evaluations,
  execute,
  LIMITS,
  onError,
  openPool,
  Recorder,
  ScriptedModels,
  template,
} from '../unit/engine-support.js';

/** Longest time in which the event loop may serve nobody else, ms. */
const MOST_SILENCE_MS = 250;
const RESOLUTION_MS = 5;
/** Takes JavaScript's regular expressions for ever. */
const QUERY = `${'a'.repeat(40)}b`;

/** The longest silence of the event loop during `action`, ms. */
async function silenceOf(action: () => Promise<unknown>): Promise<number> {
  const delay = monitorEventLoopDelay({ resolution: RESOLUTION_MS });
  delay.enable();
  await action();
  delay.disable();
  return delay.max / 1e6 - RESOLUTION_MS;
}

/** Many connections with conditions from one agent to others, each with `expression(index)`. */
function fork(count: number, expression: (index: number) => string, { stored = false } = {}): Graph {
  const targets = Array.from({ length: 99 }, (_, index) => template(`t${index}`));
  const connections = Array.from({ length: count }, (_, index) =>
    connect('start', `t${index % 99}`, expression(index)),
  );
  const agents = [template('start'), ...targets];
  return compileGraph({ agents, connections }, { models: new ScriptedModels(), limits: LIMITS, stored });
}

describe('an execution with expensive conditions', () => {
  it.each([40, 1000])('does not silence the event loop for the others: %i of them', async (count) => {
    const yardstick = await Yardstick.lay();
    const attack = fork(count, (index) => `query.matches("^(a+)+$") || ${index} < 0`);
    // What they take in all is for the budget to bound; here it is about who waits for them.
    const evaluator = openPool({ budget_ms: 600_000 }).pool;
    const outcomes: unknown[] = [];
    const silence = await silenceOf(async () => {
      const attacked = execute(attack, { input: { query: QUERY }, evaluator });
      // Another one, which needs a thread, too, comes by while the first one is still at work.
      const quick = compile([template('a', '{{ query | upcase }}')]);
      const bystander = execute(quick, { input: { query: 'b' }, evaluator });
      outcomes.push((await bystander).response, (await attacked).status);
    });
    expect(outcomes).toEqual(['B', 'completed']);
    await yardstick.expectAtMost(silence, MOST_SILENCE_MS, 'the longest silence of the event loop');
  });

  it('with stored patterns of JavaScript ends with the first condition, and leaves out the others', async () => {
    const yardstick = await Yardstick.lay();
    const own = openPool();
    const attack = fork(1000, (index) => `query.matches("^(?=a)(a+)+$") || ${index} < 0`, { stored: true });
    const silence = await silenceOf(async () => {
      const attacked = execute(attack, { input: { query: QUERY }, evaluator: own.pool });
      const bystander = execute(compile([template('a', '{{ query | upcase }}')]), {
        input: { query: 'b' },
        evaluator: own.pool,
      });
      expect((await bystander).response).toBe('B');
      expect(await attacked).toMatchObject({
        status: 'error',
        error: { code: 'agent_error', message: expect.stringContaining('it takes longer than 500 ms') },
      });
    });
    await yardstick.expectAtMost(silence, MOST_SILENCE_MS, 'the longest silence of the event loop');
    const { values } = await own.metrics.evaluations.get();
    expect(values).toEqual([{ labels: { place: 'thread' }, value: 2 }]);
  });

  it('lets others pass that have taken less', async () => {
    const own = openPool({ threads: 1, budget_ms: 600_000 });
    const ends: string[] = [];
    const slow = fork(30, (index) => `[1].all(x, query.matches("^(a+)+$")) || ${index} < 0`);
    const run = async (name: string, graph: Graph) => {
      await execute(graph, { input: { query: QUERY }, evaluator: own.pool });
      ends.push(name);
    };
    const quick = compile([template('a', '{{ query | upcase }}')]);
    await Promise.all([run('slow', slow), ...[1, 2, 3].map((number) => run(`quick ${number}`, quick))]);
    expect(ends).toEqual(['quick 1', 'quick 2', 'quick 3', 'slow']);
  });
});

describe('a budget of evaluation', () => {
  it('ends the run when it is used up, though an error connection would handle the failure', async () => {
    const own = openPool({ budget_ms: 1 });
    const busy = '{% for i in (1..300) %}{% assign x = i | plus: 1 %}{% endfor %}{{ x }}';
    const graph = compile(
      [template('a', busy), template('b', busy), template('c')],
      [connect('a', 'b'), onError('b', 'c')],
    );
    const observer = new Recorder();
    expect(await execute(graph, { evaluator: own.pool, observer })).toMatchObject({
      status: 'error',
      error: { code: 'evaluation_limit', message: expect.stringContaining('they may take 1 ms') },
    });
    expect(observer.statuses()).toEqual({ a: 'completed', b: 'error' });
    // Each execution has its own.
    expect(await execute(compile([template('a', busy)]), { evaluator: own.pool })).toMatchObject({
      response: '301',
    });
  });
});

describe('an evaluation', () => {
  it('is not waited for when its run is cancelled', async () => {
    const own = openPool({ threads: 1 });
    const cancel = new AbortController();
    const endless = '{% for i in (1..9000) %}{% for j in (1..9000) %}{% endfor %}{% endfor %}';
    const observer = new Recorder();
    const run = execute(compile([template('a', endless), template('b', endless)]), {
      evaluator: own.pool,
      observer,
      signal: cancel.signal,
    });
    await new Promise((resolve) => setImmediate(resolve));
    cancel.abort();
    expect((await run).status).toBe('aborted');
    expect(observer.statuses()).toEqual({ a: 'cancelled', b: 'cancelled' });
    // The first one is in its thread, or on its way there; nothing of it has come back.
    expect((await own.metrics.evaluations.get()).values).toEqual([]);
  });

  it('that ends its thread fails alone, and another thread takes its place', async () => {
    const own = openPool({ threads: 1 });
    // Millions of texts of one character, made in a single step that nothing interrupts, take more than a thread may have.
    const big = Array.from({ length: 4_900_000 }, (_, i) => String.fromCharCode(0x4e00 + (i % 5000))).join(
      '',
    );
    const split =
      '{% assign a = variables.big | split: "" %}{% assign b = variables.big | split: "" %}{{ a | size }}';
    const attack = compile([template('a', split)]);
    const quick = compile([template('a', '{{ query | upcase }}')]);
    const variables = { big };
    const [attacked, ...others] = await Promise.all([
      execute(attack, { evaluator: own.pool, input: { variables } }),
      ...[1, 2, 3].map(() => execute(quick, { evaluator: own.pool, input: { query: 'b' } })),
    ]);
    expect(attacked).toMatchObject({ status: 'error', error: { code: 'agent_error' } });
    expect(others.map(({ response }) => response)).toEqual(['B', 'B', 'B']);
  });

  it('rejects, and is not left waiting, when the pool is closed', async () => {
    const own = openPool({ threads: 1 });
    const waiting = [1, 2].map(() =>
      evaluations(own.pool).inThread(() => ({
        kind: 'template',
        source: '{{ query | upcase }}',
        query: 'b',
      })),
    );
    await Promise.all([
      own.pool.close(),
      ...waiting.map((result) => expect(result).rejects.toThrow('is closed')),
    ]);
  });
});

it('texts that double and are compared end with a code, in a process that lives with little memory', async () => {
  const child = new URL('../support/doubling-child.mjs', import.meta.url);
  const { stdout, stderr } = await promisify(execFile)(process.execPath, [child.pathname]);
  const { codes, mostMb } = JSON.parse(stdout) as { codes: string[]; mostMb: number };
  expect(codes).toEqual(codes.map(() => 'agent_error'));
  expect(mostMb).toBeLessThan(500);
  expect(stderr).toBe(''); // no thread was lost on the way
});

it.each([
  ['values', '{{a.b.c}}'.repeat(9999)],
  ['values between texts', 'x{{a.b}}'.repeat(9999)],
  ['values and texts in a tag', `{%if a%}${'x{{a.b}}'.repeat(9990)}{%endif%}`],
  ['tags between texts', 'x{{a}}{%if a%}y{%endif%}'.repeat(3333)],
  ['lines of one tag', `{%liquid\n${'echo a\n'.repeat(9990)}%}`],
])(
  'a large definition of %s is compiled in pieces, and so does not silence the event loop',
  async (_of, text) => {
    const yardstick = await Yardstick.lay();
    const agents = Array.from({ length: 10 }, (_, index) => template(`a${index}`, text));
    const connections = Array.from({ length: 500 }, (_, index) =>
      connect('a0', `a${1 + (index % 9)}`, `${index} == 1${' + 1'.repeat(200)}`),
    );
    const turns = new Turns();
    const options = { models: new ScriptedModels(), limits: LIMITS };
    const silence = await silenceOf(() =>
      compileGraphInTurns({ agents, connections }, options, () => turns.wait()),
    );
    await yardstick.expectAtMost(silence, MOST_SILENCE_MS, 'the longest silence of the event loop');
  },
);

it('a definition of too many tags is refused', () => {
  expect(() => compile([template('a', '{{a}}'.repeat(10_001))])).toThrow('more than 10000 tags and outputs');
  const lines = `{%liquid\n${'#\n'.repeat(49_000)}%}`;
  expect(() => compile([template('a', lines)])).toThrow('a tag has more than 10000 lines');
});

it('the example of a value put into a text, and of a comparison, needs no thread', async () => {
  const own = openPool();
  const graph = compile(
    [
      template('a', 'Hello {{ variables.user.name }}, {{ query }}'),
      template('b', '{{ outputs.a }}!'),
      template('c'),
    ],
    [
      connect('a', 'b', 'output.lowerAscii().contains("hello") && variables.user.age >= 18'),
      connect('a', 'c', 'query == "no" || size(output) > 1000'),
    ],
  );
  const input = { query: 'hi', variables: { user: { name: 'Ann', age: 20 } } };
  expect(await execute(graph, { evaluator: own.pool, input })).toMatchObject({ response: 'Hello Ann, hi!' });
  expect((await own.metrics.evaluations.get()).values).toEqual([{ labels: { place: 'loop' }, value: 4 }]);
});

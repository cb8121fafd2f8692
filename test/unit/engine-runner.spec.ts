import { describe, expect, it } from '@jest/globals';
import type { StepResult } from '../../src/engine/runner.js';
import { rounds } from '../support/effort.js';
import {
  barrier,
  compile,
  connect,
  deferred,
  execute,
  llm,
  onError,
  Recorder,
  says,
  ScriptedModels,
  step,
  template,
  type Script,
} from './engine-support.js';

describe('the order of agents', () => {
  it('runs one agent', async () => {
    const observer = new Recorder();
    const outcome = await execute(compile([template('a', 'You said: {{ query }}')]), { observer });
    expect(outcome).toEqual({
      status: 'completed',
      response: 'You said: the query',
      usage: { input_tokens: 0, output_tokens: 0 },
    });
    expect(observer.events).toEqual(['start a', 'a: You said: the query', 'completed a']);
  });

  it('shows templates nothing of the server', async () => {
    const graph = compile([
      template('a', '{{ models }}{{ overrides }}{{ signal }}{{ agent_id }}{{ sources }}{{ emit }}'),
    ]);
    expect((await execute(graph)).response).toBe('');
  });

  it('emits nothing for an empty text', async () => {
    const observer = new Recorder();
    expect((await execute(compile([template('a', '')]), { observer })).response).toBe('');
    expect(observer.events).toEqual(['start a', 'completed a']);
  });

  it('looks again for room before each of many agents says its piece', async () => {
    const said: string[] = [];
    let isFull = true;
    const waiting = new Set<() => void>();
    class Full extends Recorder {
      room(): Promise<void> | undefined {
        return isFull ? new Promise((resolve) => waiting.add(resolve)) : undefined;
      }
      override content(agent_id: string): undefined {
        said.push(agent_id);
        isFull = true; // as one piece can fill it
      }
    }
    const agents = Array.from({ length: 20 }, (_, index) => template(`a${index}`, 'x'));
    const run = execute(compile(agents), { observer: new Full() });
    for (let round = 1; round <= agents.length; round++) {
      const last = agents.length - round + 1;
      while (waiting.size < last) await new Promise((resolve) => setImmediate(resolve));
      isFull = false;
      const all = [...waiting];
      waiting.clear();
      all.forEach((resolve) => resolve());
      await new Promise((resolve) => setImmediate(resolve));
      expect(said).toHaveLength(round);
    }
    expect((await run).status).toBe('completed');
  });

  it('runs independent agents at the same time', async () => {
    const meet = barrier(3);
    const waits: Script = async function* () {
      await meet();
      yield [{ type: 'text', text: 'met' }];
    };
    const models = new ScriptedModels({ a: waits, b: waits, c: waits });
    const graph = compile(
      [llm('a'), llm('b'), llm('c'), template('join', '{{ outputs.a }} {{ outputs.b }} {{ outputs.c }}')],
      [connect('a', 'join'), connect('b', 'join'), connect('c', 'join')],
      { models },
    );
    expect((await execute(graph, { models })).response).toBe('met met met');
  });

  it('does not let one branch wait for another', async () => {
    const gate = deferred();
    const observer = new (class extends Recorder {
      override stepFinished(result: StepResult) {
        this.record(result);
        if (result.agent_id === 'fast2') gate.resolve();
      }
    })();
    const models = new ScriptedModels({
      slow: async function* () {
        await gate.promise;
        yield [{ type: 'text', text: 'slow' }];
      },
    });
    const graph = compile([llm('slow'), template('fast'), template('fast2')], [connect('fast', 'fast2')], {
      models,
    });
    expect((await execute(graph, { models, observer })).response).toBe('slow\n\nfast2');
  });

  it('starts a joining agent once, after all of its sources', async () => {
    const observer = new Recorder();
    await execute(
      compile(
        [template('join', '{{ outputs.a }}{{ outputs.b }}'), template('a'), template('b'), template('b0')],
        [connect('a', 'join'), connect('b0', 'b'), connect('b', 'join')],
      ),
      { observer },
    );
    expect(observer.events.slice(-3)).toEqual(['start join', 'join: ab', 'completed join']);
    expect(observer.events.filter((event) => event === 'start join')).toHaveLength(1);
  });

  it('starts no successor before the checkpoint of its source is kept', async () => {
    const kept = deferred();
    const reached = deferred();
    const observer = new (class extends Recorder {
      override stepFinished(result: StepResult) {
        this.record(result);
        if (result.agent_id !== 'a') return undefined;
        reached.resolve();
        return kept.promise;
      }
    })();
    const run = execute(compile([template('a'), template('b')], [connect('a', 'b')]), { observer });
    await reached.promise;
    await new Promise((resolve) => setImmediate(resolve));
    expect(observer.events).toEqual(['start a', 'a: a', 'completed a']);
    kept.resolve();
    expect((await run).response).toBe('b');
  });

  it('runs no agent before its start was noted', async () => {
    const noted = deferred();
    const models = new ScriptedModels({ a: says('x') });
    const observer = new (class extends Recorder {
      override stepStarted() {
        return noted.promise;
      }
    })();
    const run = execute(compile([llm('a')], [], { models }), { models, observer });
    await new Promise((resolve) => setImmediate(resolve));
    expect(models.requests).toHaveLength(0);
    noted.resolve();
    expect((await run).response).toBe('x');
  });

  it('survives chains as long as the limits allow, also of skipped and of stored agents', async () => {
    const length = rounds(10_000, 1000);
    const ids = Array.from({ length }, (_, index) => `n${index}`);
    const limits = { maxAgents: length, maxConnections: length };
    const chain = ids.slice(1).map((id, index) => connect(`n${index}`, id));
    const graph = compile(
      ids.map((id) => template(id)),
      chain,
      { limits },
    );
    expect((await execute(graph)).response).toBe(`n${length - 1}`);

    const observer = new Recorder();
    const skipping = compile(
      ids.map((id) => template(id)),
      [connect('n0', 'n1', 'false'), ...chain.slice(1)],
      { limits },
    );
    expect((await execute(skipping, { observer })).status).toBe('completed');
    expect([...observer.steps.values()].filter(({ status }) => status === 'skipped')).toHaveLength(
      length - 1,
    );

    const resumed = new Recorder();
    const outcome = await execute(graph, {
      observer: resumed,
      completed: new Map(ids.slice(0, -1).map((id) => step(id))),
    });
    expect(outcome.response).toBe(`n${length - 1}`);
    expect(resumed.steps.size).toBe(1);
  });
});

describe('connections', () => {
  it('take every condition that holds, and skip what none leads to', async () => {
    const observer = new Recorder();
    const outcome = await execute(
      compile(
        [template('a', 'yes'), template('b'), template('c'), template('d'), template('after_d')],
        [
          connect('a', 'b', 'output == "yes"'),
          connect('a', 'c', 'query.contains("query") && variables.n == 1'),
          connect('a', 'd', 'output == "no"'),
          connect('d', 'after_d'),
        ],
      ),
      { observer, input: { variables: { n: 5 }, overrides: { variables: { n: 1 } } } },
    );
    expect(outcome.response).toBe('b\n\nc');
    expect(observer.statuses()).toEqual({
      a: 'completed',
      b: 'completed',
      c: 'completed',
      d: 'skipped',
      after_d: 'skipped',
    });
    expect(observer.events).not.toContain('start d');
    expect(observer.steps.get('d')).toEqual({
      agent_id: 'd',
      status: 'skipped',
      output: '',
      usage: { input_tokens: 0, output_tokens: 0 },
    });
  });

  it('let an agent run when one of its several sources was skipped', async () => {
    const outcome = await execute(
      compile(
        [
          template('a'),
          template('no'),
          template('yes'),
          template('join', '{{ outputs.yes }}{{ outputs.no }}!'),
        ],
        [
          connect('a', 'no', 'false'),
          connect('a', 'yes', 'true'),
          connect('no', 'join'),
          connect('yes', 'join'),
        ],
      ),
    );
    expect(outcome.response).toBe('yes!');
  });

  it('do not take error connections of what completed or was skipped', async () => {
    const observer = new Recorder();
    await execute(
      compile(
        [template('a'), template('b'), template('on_a'), template('on_b')],
        [connect('a', 'b', 'false'), onError('a', 'on_a'), onError('b', 'on_b')],
      ),
      { observer },
    );
    expect(observer.statuses()).toEqual({ a: 'completed', b: 'skipped', on_a: 'skipped', on_b: 'skipped' });
  });

  it('end the run, naming themselves, when their condition can not be evaluated', async () => {
    const observer = new Recorder();
    const outcome = await execute(
      compile([template('a'), template('b')], [connect('a', 'b', 'variables.plan == "pro"')]),
      { observer },
    );
    expect(outcome).toMatchObject({
      status: 'error',
      error: {
        code: 'agent_error',
        message: `The condition of the connection "a -> b" can't be evaluated: No such key: plan.`,
      },
    });
    expect(observer.statuses()).toEqual({ a: 'completed' });
  });

  it('show agents only the outputs of those before them', async () => {
    const outcome = await execute(
      compile(
        [
          template('a'),
          template('b', '{{ outputs.a }}b'),
          template('stranger'),
          template('c', '{{ outputs.a }},{{ outputs.b }},{{ outputs.stranger }},{{ outputs.c }}'),
        ],
        [connect('a', 'b'), connect('b', 'c')],
      ),
    );
    expect(outcome.response).toBe('stranger\n\na,ab,,');
  });
});

import { describe, expect, it } from '@jest/globals';
import { AppError, TransientError } from '../../src/errors.js';
import type { StepResult } from '../../src/engine/runner.js';
import {
  aborted,
  acts,
  barrier,
  compile,
  connect,
  execute,
  fails,
  llm,
  onError,
  Recorder,
  says,
  ScriptedModels,
  step,
  template,
  USAGE,
  type Script,
} from './engine-support.js';

const refused = new AppError('model_error', 'The model refused.');

describe('checkpoints of an earlier attempt', () => {
  const models = new ScriptedModels({ c: says('new c'), bad: fails(refused) });
  const graph = compile(
    [template('a'), template('b'), template('no'), llm('c')],
    [
      connect('a', 'b', 'output == "stored a"'),
      connect('a', 'no', 'output == "a"'),
      connect('b', 'c'),
      connect('no', 'c'),
    ],
    { models },
  );

  it('are neither run nor reported again, and their decisions hold', async () => {
    const observer = new Recorder();
    const outcome = await execute(graph, {
      models,
      observer,
      completed: new Map([step('a'), step('b'), step('no', { status: 'skipped', output: '' })]),
    });
    expect(observer.events).toEqual(['start c', 'c: new c', 'completed c']);
    expect(outcome).toEqual({
      status: 'completed',
      response: 'new c',
      usage: { input_tokens: USAGE.input_tokens + 3, output_tokens: USAGE.output_tokens + 3 },
    });
    expect(models.requests.at(-1)?.request.messages.at(-1)?.content).toBe('Output of b:\nstored b');
  });

  it('decide again what was not yet decided', async () => {
    const observer = new Recorder();
    await execute(graph, { models, observer, completed: new Map([step('a')]) });
    expect(observer.statuses()).toEqual({ b: 'completed', no: 'skipped', c: 'completed' });
  });

  it('run again what was cancelled', async () => {
    const observer = new Recorder();
    const completed = new Map([step('a', { status: 'cancelled', output: 'half' })]);
    const outcome = await execute(compile([template('a')]), { observer, completed });
    expect(outcome.response).toBe('a');
  });

  it('go on behind a failure that was handled', async () => {
    const handled = compile(
      [llm('bad'), template('fallback', '{{ errors.bad.message }}')],
      [onError('bad', 'fallback')],
      {
        models,
      },
    );
    const error = { code: 'model_error', message: 'It failed before.' } as const;
    const outcome = await execute(handled, {
      models,
      completed: new Map([step('bad', { status: 'error', output: 'half', error })]),
    });
    expect(outcome).toMatchObject({ status: 'completed', response: 'It failed before.' });
  });

  it('end at once when all is there', async () => {
    const observer = new Recorder();
    const completed = new Map([
      step('a'),
      step('b'),
      step('no', { status: 'skipped', output: '' }),
      step('c'),
    ]);
    const outcome = await execute(graph, { models, observer, completed });
    expect(outcome).toMatchObject({ status: 'completed', response: 'stored c' });
    expect(observer.events).toEqual([]);
  });

  it('end with the error that was not handled', async () => {
    const completed = new Map([step('a', { status: 'error', output: 'half' })]);
    expect(await execute(graph, { models, completed })).toMatchObject({
      status: 'error',
      error: { code: 'agent_error', message: 'The agent "a" failed.' },
    });
  });
});

describe('an observer that throws', () => {
  const fenced = new TransientError('unavailable', 'A newer attempt owns the execution.');
  const moments: [string, () => Recorder][] = [
    [
      'at a start',
      () =>
        new (class extends Recorder {
          override async stepStarted(agent_id: string) {
            if (agent_id === 'a') throw fenced;
          }
        })(),
    ],
    [
      'at a text, at once',
      () =>
        new (class extends Recorder {
          override content(agent_id: string): undefined {
            if (agent_id === 'a') throw fenced;
          }
        })(),
    ],
    [
      'at a text, later',
      () =>
        new (class extends Recorder {
          override content(agent_id: string) {
            return agent_id === 'a' ? Promise.reject(fenced) : undefined;
          }
        })(),
    ],
    [
      'at an end',
      () =>
        new (class extends Recorder {
          override async stepFinished(result: StepResult) {
            if (result.agent_id === 'a') throw fenced;
            this.record(result);
          }
        })(),
    ],
  ];

  for (const [moment, makeObserver] of moments) {
    it(`${moment} aborts the agents, is waited for and not asked again`, async () => {
      const ended: string[] = [];
      const models = new ScriptedModels({
        a: says('x'),
        other: acts(async (signal) => {
          await aborted(signal);
          ended.push('other');
          throw signal.reason;
        }),
      });
      const observer = makeObserver();
      const graph = compile([llm('other'), llm('a'), template('after')], [connect('a', 'after')], { models });
      await expect(execute(graph, { models, observer })).rejects.toBe(fenced);
      expect(ended).toEqual(['other']);
      expect(observer.steps.size).toBe(0);
      expect(models.requests.filter(({ model }) => model === 'test/a').length).toBeLessThan(2);
    });
  }

  it('at a defect ends the run, too', async () => {
    const models = new ScriptedModels({ a: fails(refused) });
    const observer = new (class extends Recorder {
      override defect(): void {
        throw fenced;
      }
    })();
    await expect(execute(compile([llm('a')], [], { models }), { models, observer })).rejects.toBe(fenced);
  });
});

describe('one compiled graph', () => {
  it('serves many runs at the same time without mixing them', async () => {
    const meet = barrier(100);
    const echo: Script = async function* ({ messages }) {
      await meet();
      for (const message of messages) yield [{ type: 'text', text: `${message.content};` }];
      yield [{ type: 'finish', usage: USAGE }];
    };
    const models = new ScriptedModels({ echo });
    const graph = compile(
      [llm('a', 'echo', { system_prompt: '{{ query }}{{ variables.v }}' }), template('b', '{{ outputs.a }}')],
      [connect('a', 'b', 'output.contains(query) && variables.l.exists(x, x == variables.v)')],
      { models },
    );
    const outcomes = await Promise.all(
      Array.from({ length: 100 }, (_, index) =>
        execute(graph, { models, input: { query: `q${index}`, variables: { v: index, l: [0, index] } } }),
      ),
    );
    outcomes.forEach((outcome, index) => {
      expect(outcome).toEqual({
        status: 'completed',
        response: `q${index}${index};q${index};`,
        usage: USAGE,
      });
    });
  });
});

import { describe, expect, it } from '@jest/globals';
import { AppError } from '../../src/errors.js';
import {
  ask,
  compile,
  connect,
  deferred,
  execute,
  fails,
  faultsOf,
  llm,
  onError,
  Recorder,
  says,
  ScriptedModels,
  template,
  USAGE,
  type Script,
} from './engine-support.js';

it('agents whose long prompts are made at once do not wait for each other for ever', async () => {
  const ids = ['a', 'b', 'c', 'd'];
  const graph = compile(
    ids.map((agent_id) => ({
      agent_id,
      agent_type: 'llm',
      config: { model: `test/${agent_id}`, system_prompt: '{{ variables.x }}'.repeat(49) },
    })),
  );
  const models = new ScriptedModels(Object.fromEntries(ids.map((id) => [id, says(id)])));
  const input = { variables: { x: 'x'.repeat(100_000) } };
  expect(await execute(graph, { models, input })).toMatchObject({ status: 'completed' });
});

describe('an llm agent', () => {
  it('asks with its system prompt, the history and the query', async () => {
    const { request } = await ask(
      says('ok'),
      { system_prompt: 'You help {{ variables.name }} with "{{ query }}".' },
      {
        query: 'Hi',
        variables: { name: 'Ann' },
        chat_history: [
          { actor: 'system', content: 's' },
          { actor: 'user', content: 'u' },
          { actor: 'assistant', content: 'a' },
        ],
      },
    );
    expect(request?.messages).toEqual([
      { role: 'system', content: 'You help Ann with "Hi".' },
      { role: 'system', content: 's' },
      { role: 'user', content: 'u' },
      { role: 'assistant', content: 'a' },
      { role: 'user', content: 'Hi' },
    ]);
  });

  it('is not asked with more than 5,000,000 characters', async () => {
    const models = new ScriptedModels({ join: says('done') });
    const texts = ['a', 'b'].map((id) => template(id, '{{ variables.x }}{{ variables.x }}'));
    const connections = [connect('a', 'join'), connect('b', 'join')];
    const run = (length: number) =>
      execute(compile([...texts, llm('join')], connections, { models }), {
        models,
        input: { variables: { x: 'x'.repeat(length) } },
      });
    expect(await run(1_249_000)).toMatchObject({ status: 'completed', response: 'done' });
    expect(await run(1_251_000)).toMatchObject({
      status: 'error',
      error: { code: 'agent_error', message: expect.stringContaining('and may have 5000000') },
    });
    expect(models.requests).toHaveLength(1);
  });

  it('asks without a system message when its prompt is empty', async () => {
    for (const system_prompt of [undefined, '', '{{ variables.none }}']) {
      const { request } = await ask(says('ok'), { system_prompt });
      expect(request?.messages).toEqual([{ role: 'user', content: 'the query' }]);
    }
  });

  it('hears its sources in the order of their priority, each once, failed ones with their reason', async () => {
    const models = new ScriptedModels({
      join: says('done'),
      broken: fails(new AppError('model_error', 'The model refused.')),
    });
    const graph = compile(
      [template('a', 'from a'), { ...template('b', 'from b'), name: 'Bee' }, llm('broken'), llm('join')],
      [
        connect('a', 'join'),
        connect('a', 'join', 'true'),
        onError('broken', 'join'),
        onError('b', 'join'),
        connect('b', 'join', { priority: -1 }),
      ],
      { models },
    );
    await execute(graph, { models });
    expect(models.requests.at(-1)?.request.messages.slice(1)).toEqual([
      { role: 'user', content: 'Output of Bee:\nfrom b' },
      { role: 'user', content: 'Output of a:\nfrom a' },
      { role: 'user', content: 'broken failed: The model refused.' },
    ]);
  });

  it('speaks each text as it comes, and its output is what it spoke', async () => {
    const batches: Script = async function* () {
      yield [
        { type: 'text', text: 'one ' },
        { type: 'text', text: '' },
        { type: 'text', text: '\ud83d' },
      ];
      yield [
        { type: 'text', text: '\ude00\n\ndata: x' },
        { type: 'finish', usage: USAGE },
      ];
    };
    const { outcome, observer } = await ask(batches);
    expect(observer.events).toEqual([
      'start a',
      'a: one ',
      'a: \ud83d',
      'a: \ude00\n\ndata: x',
      'completed a',
    ]);
    expect(outcome).toEqual({ status: 'completed', response: 'one 😀\n\ndata: x', usage: USAGE });
  });

  it('speaks once when it does not stream', async () => {
    const { outcome, observer, models } = await ask(says('one ', 'two'), { streaming: false });
    expect(models.requests[0]?.method).toBe('generate');
    expect(observer.events).toEqual(['start a', 'a: one two', 'completed a']);
    expect(outcome).toEqual({ status: 'completed', response: 'one two', usage: USAGE });
  });

  it('completes with nothing when the model says nothing', async () => {
    const silent: Script = async function* () {};
    for (const streaming of [true, false]) {
      const { outcome, observer } = await ask(silent, { streaming });
      expect(outcome).toEqual({
        status: 'completed',
        response: '',
        usage: { input_tokens: 0, output_tokens: 0 },
      });
      expect(observer.events).toEqual(['start a', 'completed a']);
    }
  });

  it('waits while the reader is behind', async () => {
    const room = deferred();
    const filled = deferred();
    const asked: number[] = [];
    const script: Script = async function* () {
      for (const part of [1, 2, 3]) {
        asked.push(part);
        yield [{ type: 'text', text: `${part}` }];
      }
    };
    class SlowReader extends Recorder {
      override content(_agent_id: string, text: string) {
        if (text !== '1') return undefined;
        filled.resolve();
        return room.promise;
      }
    }
    const models = new ScriptedModels({ a: script });
    const observer = new SlowReader();
    const run = execute(compile([llm('a')], [], { models }), { models, observer });
    await filled.promise;
    await new Promise((resolve) => setImmediate(resolve));
    expect(asked).toEqual([1]);
    room.resolve();
    expect((await run).response).toBe('123');
  });

  it('passes its settings on, those of the request before its own, those of the agent before all', async () => {
    const config = {
      temperature: 0.1,
      max_tokens: 10,
      top_p: 0.1,
      frequency_penalty: -2,
      presence_penalty: 2,
      seed: 7,
      stop: 'END',
    };
    const own = await ask(says('ok'), config);
    expect(own.request).toMatchObject({ ...config, stop: ['END'] });

    const { request, models } = await ask(says('ok'), config, {
      overrides: {
        model: 'test/none',
        temperature: 0.5,
        max_tokens: 20,
        stop: ['A'],
        agents: { a: { model: 'test/other', temperature: 0, top_p: 1 } },
      },
    });
    expect(models.requests[0]?.model).toBe('test/other');
    expect(request).toMatchObject({ temperature: 0, max_tokens: 20, top_p: 1, stop: ['A'], seed: 7 });
  });

  it('merges variables: the deployment, the request, the agent', async () => {
    const { request } = await ask(
      says('ok'),
      { system_prompt: '{{ variables.a }}{{ variables.b }}{{ variables.c }}' },
      {
        variables: { a: 1, b: 1, c: 1 },
        overrides: { variables: { b: 2, c: 2 }, agents: { a: { variables: { c: 3 } } } },
      },
    );
    expect(request?.messages[0]?.content).toBe('123');
  });

  it('fails clearly when its model is not configured', async () => {
    const { outcome } = await ask(says('ok'), {}, { overrides: { model: 'test/none' } });
    expect(outcome).toMatchObject({ status: 'error', error: { code: 'model_not_configured' } });
  });

  it('is refused with a bad configuration', () => {
    const wrong: [string, unknown[]][] = [
      ['model', [undefined, 5, '', 'nowhere/m']],
      ['system_prompt', [5, '{{']],
      ['temperature', [-1, 2.1]],
      ['max_tokens', [0, 1.5]],
      ['top_p', [-1, 2]],
      ['frequency_penalty', [-2.1, 2.1]],
      ['presence_penalty', [-2.1, 2.1]],
      ['seed', [1.5, 'x']],
      ['stop', [5, [], Array.from('x'.repeat(17))]],
      ['streaming', ['yes', 1]],
      ['timeout', [0, -1, '5']],
      ['max_retries', [-1, 11, 1.5]],
      ['base_url', ['http://x']],
    ];
    for (const [field, values] of wrong) {
      for (const value of values) {
        const faults = faultsOf(() => compile([llm('a', 'a', { [field]: value })]));
        expect(faults).toHaveLength(1);
        expect(faults[0]?.pointer).toBe(`/configuration/agents/0/config/${field}`);
      }
    }
  });
});

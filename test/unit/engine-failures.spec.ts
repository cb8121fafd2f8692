import { getEventListeners } from 'node:events';
import { describe, expect, it } from '@jest/globals';
import { AppError } from '../../src/errors.js';
import type { StepResult } from '../../src/engine/runner.js';
import {
  aborted,
  acts,
  barrier,
  compile,
  connect,
  deferred,
  execute,
  fails,
  hangs,
  llm,
  onError,
  Recorder,
  says,
  ScriptedModels,
  step,
  template,
  type Script,
} from './engine-support.js';

const refused = new AppError('model_error', 'The model refused.');

describe('a failed agent', () => {
  it('ends the run with its error, aborts the others and keeps the text so far', async () => {
    const partial = deferred();
    const models = new ScriptedModels({
      long: async function* (_request, signal) {
        yield [{ type: 'text', text: 'so far' }];
        partial.resolve();
        await aborted(signal);
        throw signal.reason;
      },
      bad: async function* () {
        yield [{ type: 'text', text: 'half' }];
        await partial.promise;
        throw refused;
      },
    });
    const observer = new Recorder();
    const graph = compile(
      [llm('long'), llm('bad'), template('after'), template('done')],
      [connect('bad', 'after')],
      { models },
    );
    const outcome = await execute(graph, { models, observer });
    expect(outcome).toEqual({
      status: 'error',
      response: 'so far\n\ndone',
      error: { code: 'model_error', message: 'The model refused.' },
      usage: { input_tokens: 0, output_tokens: 0 },
    });
    expect(observer.statuses()).toEqual({ long: 'cancelled', bad: 'error', done: 'completed' });
    expect(observer.steps.get('long')?.output).toBe('so far');
    expect(observer.steps.get('bad')).toMatchObject({
      output: 'half',
      error: { code: 'model_error', message: 'The model refused.' },
    });
    expect(observer.defects).toEqual([refused]);
  });

  it('lets the run go on when an error connection handles it', async () => {
    const models = new ScriptedModels({ bad: fails(refused, 'half') });
    const observer = new Recorder();
    const graph = compile(
      [
        llm('bad'),
        template('fallback', '{{ errors.bad.code }}: {{ errors.bad.message }} [{{ outputs.bad }}]'),
        template('normal'),
      ],
      [onError('bad', 'fallback'), connect('bad', 'normal')],
      { models },
    );
    const outcome = await execute(graph, { models, observer });
    expect(outcome).toMatchObject({ status: 'completed', response: 'model_error: The model refused. []' });
    expect(observer.statuses()).toEqual({ bad: 'error', fallback: 'completed', normal: 'skipped' });
  });

  it('is no part of the response of a run that completed', async () => {
    const models = new ScriptedModels({ bad: fails(refused, 'half') });
    const graph = compile([llm('bad'), template('fallback')], [onError('bad', 'fallback')], { models });
    expect(graph.answers('bad')).toBe(true);
    expect((await execute(graph, { models })).response).toBe('fallback');
  });

  it('tells clients nothing of what it did not expect', async () => {
    const secret = new TypeError('secret at /etc/keys');
    const models = new ScriptedModels({ a: fails(secret) });
    const observer = new Recorder();
    const outcome = await execute(compile([llm('a')], [], { models }), { models, observer });
    expect(outcome.error?.code).toBe('agent_error');
    expect(JSON.stringify([outcome, ...observer.steps.values()])).not.toContain('secret');
    expect(observer.defects).toEqual([secret]);
  });

  it('fails in a template with words for the client', async () => {
    const outcome = await execute(compile([template('a', '{% for i in (1..100000000) %}{% endfor %}')]));
    expect(outcome.error).toEqual({
      code: 'agent_error',
      message: expect.stringContaining("The agent's template could not be rendered: memory"),
    });
  });

  it('names the first error when two fail at the same moment', async () => {
    const both = barrier(2);
    const failing = (error: AppError) =>
      acts(async () => {
        await both();
        throw error;
      });
    const models = new ScriptedModels({
      first: failing(refused),
      second: failing(new AppError('timeout', 'later')),
    });
    const graph = compile([llm('first'), llm('second')], [], { models });
    expect((await execute(graph, { models })).error?.code).toBe('model_error');
  });

  it('does not change the error when others fail while they are aborted', async () => {
    const started = deferred();
    const models = new ScriptedModels({
      first: acts(async () => {
        await started.promise;
        throw refused;
      }),
      second: acts(async (signal) => {
        started.resolve();
        await aborted(signal);
        throw new AppError('timeout', 'later');
      }),
    });
    const observer = new Recorder();
    const outcome = await execute(compile([llm('first'), llm('second')], [], { models }), {
      models,
      observer,
    });
    expect(outcome.error?.code).toBe('model_error');
    expect(observer.statuses()).toEqual({ first: 'error', second: 'cancelled' });
  });
});

describe('an abort', () => {
  it('reaches every running agent, keeps the text so far and starts nothing more', async () => {
    const controller = new AbortController();
    const running = barrier(3);
    const speaks = (text: string): Script =>
      async function* (_request, signal) {
        yield [{ type: 'text', text }];
        void running();
        await aborted(signal);
        throw signal.reason;
      };
    const models = new ScriptedModels({ a: speaks('A…'), b: speaks('B…'), c: says('never') });
    const observer = new Recorder();
    const graph = compile([llm('a'), llm('b'), llm('c')], [connect('a', 'c'), connect('b', 'c')], { models });
    const run = execute(graph, { models, observer, signal: controller.signal });
    await Promise.race([running(), run]);
    controller.abort(new Error('cancelled by a client'));
    const outcome = await run;
    expect(outcome).toEqual({
      status: 'aborted',
      response: '',
      usage: { input_tokens: 0, output_tokens: 0 },
    });
    expect(observer.statuses()).toEqual({ a: 'cancelled', b: 'cancelled' });
    expect([...observer.steps.values()].map(({ output }) => output)).toEqual(['A…', 'B…']);
    expect(models.requests.map(({ model }) => model)).toEqual(['test/a', 'test/b']);
  });

  it('gives models an AbortError, whatever the reason was', async () => {
    const controller = new AbortController();
    const seen = deferred<unknown>();
    const models = new ScriptedModels({
      a: acts((signal) => {
        controller.abort(new Error('lock lost'));
        seen.resolve(signal.reason);
        throw signal.reason;
      }),
    });
    await execute(compile([llm('a')], [], { models }), { models, signal: controller.signal });
    expect(await seen.promise).toMatchObject({ name: 'AbortError' });
  });

  it('keeps the partial text of an answering agent as the response', async () => {
    const controller = new AbortController();
    const observer = new (class extends Recorder {
      override content(agent_id: string, text: string) {
        if (agent_id === 'b') queueMicrotask(() => controller.abort());
        return super.content(agent_id, text);
      }
    })();
    const models = new ScriptedModels({ b: hangs('partial') });
    const graph = compile([template('a'), llm('b')], [connect('a', 'b')], { models });
    const outcome = await execute(graph, { models, observer, signal: controller.signal });
    expect(outcome).toMatchObject({ status: 'aborted', response: 'partial' });
  });

  it('before the start runs nothing', async () => {
    const observer = new Recorder();
    const outcome = await execute(compile([template('a')]), { observer, signal: AbortSignal.abort() });
    expect(outcome.status).toBe('aborted');
    expect(observer.events).toEqual([]);
  });

  it('while a start is noted ends that agent without running it', async () => {
    const controller = new AbortController();
    const models = new ScriptedModels({ a: says('never') });
    const observer = new (class extends Recorder {
      override stepStarted() {
        controller.abort();
      }
    })();
    const outcome = await execute(compile([llm('a')], [], { models }), {
      models,
      observer,
      signal: controller.signal,
    });
    expect(outcome.status).toBe('aborted');
    expect(models.requests).toEqual([]);
    expect(observer.statuses()).toEqual({ a: 'cancelled' });
  });

  it('that comes when all is done changes nothing', async () => {
    const controller = new AbortController();
    const observer = new (class extends Recorder {
      override stepFinished(result: StepResult) {
        this.record(result);
        controller.abort();
      }
    })();
    const outcome = await execute(compile([template('a')]), { observer, signal: controller.signal });
    expect(outcome).toMatchObject({ status: 'completed', response: 'a' });
  });

  it('that comes while a checkpoint is kept is no error of the conditions behind it', async () => {
    const controller = new AbortController();
    const observer = new (class extends Recorder {
      override stepFinished(result: StepResult) {
        this.record(result);
        controller.abort();
      }
    })();
    const graph = compile([template('a'), template('b')], [connect('a', 'b', 'variables.missing')]);
    const outcome = await execute(graph, { observer, signal: controller.signal });
    expect(outcome.status).toBe('aborted');
    expect(observer.statuses()).toEqual({ a: 'completed' });
  });

  it('stops an agent that goes on speaking', async () => {
    const controller = new AbortController();
    const models = new ScriptedModels({
      a: async function* () {
        for (let count = 0; ; count += 1) {
          if (count === 5) controller.abort();
          yield [{ type: 'text', text: '.' }];
        }
      },
    });
    const observer = new Recorder();
    const outcome = await execute(compile([llm('a')], [], { models }), {
      models,
      observer,
      signal: controller.signal,
    });
    expect(outcome).toMatchObject({ status: 'aborted', response: '.....' });
    expect(observer.steps.get('a')?.output).toBe('.....');
  });

  it('waits until the agents have ended', async () => {
    const controller = new AbortController();
    const closed = deferred();
    const asked = deferred();
    const models = new ScriptedModels({
      a: acts(async (signal) => {
        asked.resolve();
        await aborted(signal);
        await closed.promise;
        throw signal.reason;
      }),
    });
    let ended = false;
    const run = execute(compile([llm('a')], [], { models }), { models, signal: controller.signal }).finally(
      () => (ended = true),
    );
    await asked.promise;
    controller.abort();
    await new Promise((resolve) => setImmediate(resolve));
    expect(ended).toBe(false);
    closed.resolve();
    await run;
  });

  it('leaves no listener on the signal, however the run ended', async () => {
    const { signal } = new AbortController();
    await execute(compile([template('a')]), { signal });
    await execute(compile([template('a', '{% for i in (1..100000000) %}{% endfor %}')]), { signal });
    const fenced = new (class extends Recorder {
      override content(): never {
        throw new Error('fenced');
      }
    })();
    await expect(execute(compile([template('a')]), { signal, observer: fenced })).rejects.toThrow('fenced');
    expect(getEventListeners(signal, 'abort')).toEqual([]);
  });

  it('is waited for by any number of agents, and by none any more when they ended', async () => {
    const signals = new Set<AbortSignal>();
    const models = new ScriptedModels({
      m: async function* (_request, signal) {
        signals.add(signal);
        yield [{ type: 'text', text: 'x' }];
      },
    });
    const agents = Array.from({ length: 99 }, (_, index) => llm(`n${index}`, 'm', { timeout: 60 }));
    await execute(compile([llm('first', 'm'), ...agents], [], { models }), { models });
    // The run's own, where Node must not warn of a leak, and one for each timeout.
    expect(signals.size).toBe(100);
    const [shared = new AbortController().signal] = signals;
    const limit = Object.getOwnPropertySymbols(shared).find(
      ({ description }) => description === 'events.maxEventTargetListeners',
    );
    expect(Reflect.get(shared, limit ?? '')).toBe(0);
    for (const signal of signals) expect(getEventListeners(signal, 'abort')).toEqual([]);
  });
});

describe('an agent that says too much', () => {
  /** Besides its characters. */
  const PIECE = 48;
  const limits = { agent: 10 + 2 * PIECE, execution: 25 + 3 * PIECE };
  const talks = (text: string, closed: () => void): Script =>
    async function* () {
      try {
        for (;;) yield [{ type: 'text', text }];
      } finally {
        closed();
      }
    };

  it('is stopped before its first text beyond the limit, and the model with it', async () => {
    let closed = 0;
    const models = new ScriptedModels({ long: talks('1234', () => (closed += 1)) });
    const observer = new Recorder();
    const graph = compile([llm('long')], [], { models });
    const outcome = await execute(graph, { models, observer, limits });
    expect(outcome).toMatchObject({
      status: 'error',
      response: '12341234',
      error: { code: 'output_too_large' },
    });
    expect(closed).toBe(1);
    expect(observer.defects).toEqual([expect.objectContaining({ limit: 'agent' })]);
  });

  it('is handled by an error connection', async () => {
    const models = new ScriptedModels({ long: says('x'.repeat(limits.agent - PIECE + 1)) });
    const agents = [llm('long'), template('after', '{{ errors.long.code | slice: 0, 6 }}')];
    const graph = compile(agents, [onError('long', 'after')], { models });
    const outcome = await execute(graph, { models, limits });
    expect(outcome).toMatchObject({ status: 'completed', response: 'output' });
  });

  it('ends the run where all agents together say too much, whatever handles its failure', async () => {
    const graph = compile(
      [template('a', '123456789'), template('b', '123456789'), template('c', '12345678'), template('d', 'x')],
      [connect('a', 'b'), connect('b', 'c'), onError('c', 'd')],
    );
    const observer = new Recorder();
    const outcome = await execute(graph, { observer, limits });
    expect(outcome).toMatchObject({ status: 'error', error: { code: 'output_too_large' } });
    expect(observer.statuses()).toEqual({ a: 'completed', b: 'completed', c: 'error' });
    expect(observer.defects).toEqual([expect.objectContaining({ limit: 'execution' })]);
  });

  it('counts what an earlier attempt has kept', async () => {
    const graph = compile([template('a'), template('b', '1234567')], [connect('a', 'b')]);
    const completed = new Map([step('a', { output: 'x'.repeat(limits.execution - 7 - PIECE + 1) })]);
    expect(await execute(graph, { completed, limits })).toMatchObject({
      error: { code: 'output_too_large' },
    });
  });
});

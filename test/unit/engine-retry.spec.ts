import { afterEach, beforeEach, describe, expect, it, jest } from '@jest/globals';
import { AppError, TransientError } from '../../src/errors.js';
import type { RunInput } from '../../src/engine/runner.js';
import {
  aborted,
  acts,
  ask,
  compile,
  deferred,
  execute,
  fails,
  hangs,
  inTurn,
  llm,
  Recorder,
  says,
  ScriptedModels,
  type Script,
} from './engine-support.js';

const busy = new TransientError('model_error', 'The model is busy.');

describe('a model call that fails', () => {
  const waits: number[] = [];

  beforeEach(() => {
    jest.useFakeTimers({ doNotFake: ['nextTick', 'setImmediate', 'queueMicrotask'] });
    jest.spyOn(Math, 'random').mockReturnValue(1);
    const fakeTimeout = globalThis.setTimeout;
    const recorded = (callback: () => void, ms: number) => {
      waits.push(ms);
      return fakeTimeout(callback, ms);
    };
    jest.spyOn(globalThis, 'setTimeout').mockImplementation(recorded as typeof setTimeout);
  });
  afterEach(() => {
    expect(jest.getTimerCount()).toBe(0);
    jest.restoreAllMocks();
    jest.useRealTimers();
  });

  /** Runs `ask` with every wait over at once; `waits` then holds them in ms. */
  async function askWithoutWaiting(...args: Parameters<typeof ask>) {
    waits.length = 0;
    let ended = false;
    const asked = ask(...args).finally(() => (ended = true));
    while (!ended) {
      await new Promise((resolve) => setImmediate(resolve));
      await jest.runAllTimersAsync();
    }
    return { ...(await asked), waits: [...waits] };
  }

  it('is repeated before its first text, waiting longer each time', async () => {
    const { outcome, models, waits, observer } = await askWithoutWaiting(
      inTurn(fails(busy), fails(busy), fails(busy), says('at last')),
      { max_retries: 3 },
    );
    expect(outcome).toMatchObject({ status: 'completed', response: 'at last' });
    expect(models.requests).toHaveLength(4);
    expect(waits).toEqual([200, 400, 800]);
    expect(observer.defects).toEqual([busy, busy, busy]);
  });

  it('never waits longer than 10 s by itself', async () => {
    const { waits } = await askWithoutWaiting(fails(busy), { max_retries: 10 });
    expect(waits).toEqual([200, 400, 800, 1600, 3200, 6400, 10_000, 10_000, 10_000, 10_000]);
  });

  it('is repeated as often as the agent says, else the run, else twice', async () => {
    const calls = async (config: object, input: Partial<RunInput>) =>
      (await askWithoutWaiting(fails(busy), { ...config }, input)).models.requests.length;
    expect(await calls({ max_retries: 0 }, { max_retries: 5 })).toBe(1);
    expect(await calls({}, { max_retries: 4 })).toBe(5);
    expect(await calls({}, { max_retries: 0 })).toBe(1);
    expect(await calls({}, {})).toBe(3);
  });

  it('keeps its code and words when it fails for good', async () => {
    const { outcome } = await askWithoutWaiting(fails(busy));
    expect(outcome).toMatchObject({
      status: 'error',
      error: { code: 'model_error', message: 'The model is busy.' },
    });
  });

  it('is repeated also when it does not stream', async () => {
    const { outcome } = await askWithoutWaiting(inTurn(fails(busy, 'lost'), says('kept')), {
      streaming: false,
    });
    expect(outcome).toMatchObject({ status: 'completed', response: 'kept' });
  });

  it('is not repeated after its first text', async () => {
    const { outcome, models, observer } = await askWithoutWaiting(
      inTurn(fails(busy, 'spoken'), says('again')),
    );
    expect(models.requests).toHaveLength(1);
    expect(outcome).toMatchObject({ status: 'error', response: 'spoken', error: { code: 'model_error' } });
    expect(observer.steps.get('a')).toMatchObject({ status: 'error', output: 'spoken' });
  });

  it('is not repeated when it would fail again', async () => {
    for (const error of [
      new AppError('model_error', 'No.'),
      new AppError('timeout', 'No.'),
      new TypeError('x'),
    ]) {
      const { models } = await askWithoutWaiting(inTurn(fails(error), says('again')));
      expect(models.requests).toHaveLength(1);
    }
  });

  it('waits as long as the upstream asks, but not for more than a minute', async () => {
    const asks = (retryAfter: number) =>
      fails(new TransientError('model_error', 'Slow down.', { retryAfter }));
    const patient = await askWithoutWaiting(inTurn(asks(60), asks(0.1), says('ok')));
    expect(patient.waits).toEqual([60_000, 400]);
    const hurried = await askWithoutWaiting(inTurn(asks(61), says('ok')));
    expect(hurried.outcome.status).toBe('error');
    expect(hurried.waits).toEqual([]);
  });

  it('is repeated when the upstream had closed the idle connection', async () => {
    const reset = Object.assign(new Error('read ECONNRESET at 10.0.0.1'), { code: 'ECONNRESET' });
    const wrapped = new TypeError('fetch failed', { cause: reset });
    for (const error of [reset, wrapped]) {
      const { outcome } = await askWithoutWaiting(inTurn(fails(error), says('ok')));
      expect(outcome).toMatchObject({ status: 'completed', response: 'ok' });
    }
    const { outcome } = await askWithoutWaiting(fails(reset));
    expect(outcome.error).toEqual({ code: 'model_error', message: 'The connection to the model was lost.' });
  });

  it('stops waiting at once when the run is aborted', async () => {
    const controller = new AbortController();
    const models = new ScriptedModels({
      a: fails(new TransientError('model_error', 'x', { retryAfter: 60 })),
    });
    const waiting = deferred();
    class Watcher extends Recorder {
      override defect(): void {
        waiting.resolve();
      }
    }
    const run = execute(compile([llm('a')], [], { models }), {
      models,
      observer: new Watcher(),
      signal: controller.signal,
    });
    await waiting.promise;
    controller.abort();
    expect((await run).status).toBe('aborted');
    expect(models.requests).toHaveLength(1);
  });
});

describe('the timeout of a model call', () => {
  beforeEach(() => {
    jest.useFakeTimers({ doNotFake: ['nextTick', 'setImmediate', 'queueMicrotask'] });
  });
  afterEach(() => {
    expect(jest.getTimerCount()).toBe(0);
    jest.useRealTimers();
  });

  /** Lets `ms` go by once the model was asked. */
  async function askAndWait(ms: number, config: object, input: Partial<RunInput> = {}) {
    const asked = deferred<AbortSignal>();
    const script: Script = (request, signal, call) => {
      asked.resolve(signal);
      return hangs('so far')(request, signal, call);
    };
    const run = ask(script, { ...config }, input);
    const signal = await asked.promise;
    await jest.advanceTimersByTimeAsync(ms);
    return { run, signal };
  }

  it('ends the call and the run with code timeout, keeping the text so far', async () => {
    const { run, signal } = await askAndWait(5000, { timeout: 5 });
    expect(signal.aborted).toBe(true);
    expect((await run).outcome).toMatchObject({
      status: 'error',
      response: 'so far',
      error: { code: 'timeout', message: 'The model did not answer agent "a" within its 5 s.' },
    });
  });

  it("can be overridden for an agent; the top-level one is the run's", async () => {
    const { run } = await askAndWait(1000, { timeout: 5 }, { overrides: { agents: { a: { timeout: 1 } } } });
    expect((await run).outcome.error?.message).toContain('within its 1 s');

    const controller = new AbortController();
    const models = new ScriptedModels({ a: hangs() });
    const observer = new Recorder();
    const run2 = execute(compile([llm('a')], [], { models }), {
      models,
      observer,
      signal: controller.signal,
      input: { overrides: { timeout: 1 } },
    });
    await jest.advanceTimersByTimeAsync(10_000);
    expect(observer.steps.size).toBe(0);
    controller.abort();
    expect((await run2).status).toBe('aborted');
  });

  it('is not blamed for other failures', async () => {
    const { outcome } = await ask(fails(new AppError('model_error', 'Refused.')), { timeout: 5 });
    expect(outcome.error).toEqual({ code: 'model_error', message: 'Refused.' });
  });

  it('does not hide an abort of the run', async () => {
    const controller = new AbortController();
    const asked = deferred();
    const models = new ScriptedModels({
      a: acts(async (signal) => {
        asked.resolve();
        await aborted(signal);
        throw signal.reason;
      }),
    });
    const run = execute(compile([llm('a', 'a', { timeout: 5 })], [], { models }), {
      models,
      signal: controller.signal,
    });
    await asked.promise;
    controller.abort();
    expect((await run).status).toBe('aborted');
  });
});

import { afterEach, beforeEach, expect, jest, test } from '@jest/globals';
import { Repeat } from '../../src/repeat.js';

const everyMs = 1000;
const errors: unknown[] = [];
const onError = (error: unknown) => void errors.push(error);

beforeEach(() => {
  jest.useFakeTimers();
  errors.length = 0;
});
afterEach(() => {
  expect(jest.getTimerCount()).toBe(0);
  jest.useRealTimers();
});

test('a round that fails is reported and does not end the repetition', async () => {
  let rounds = 0;
  const repeat = new Repeat(
    async () => {
      if (++rounds === 2) throw new Error('the second round');
    },
    { everyMs, onError },
  );
  repeat.start(10);
  await jest.advanceTimersByTimeAsync(10 + 2 * everyMs);
  expect(rounds).toBe(3);
  expect(errors).toEqual([new Error('the second round')]);
  await repeat.stop();
});

test('rounds do not overlap, however long one takes', async () => {
  let atOnce = 0;
  let most = 0;
  const repeat = new Repeat(
    async () => {
      most = Math.max(most, ++atOnce);
      await new Promise((resolve) => setTimeout(resolve, 5 * everyMs));
      atOnce--;
    },
    { everyMs, onError },
  );
  repeat.start(0);
  repeat.start(0);
  await jest.advanceTimersByTimeAsync(20 * everyMs);
  expect(most).toBe(1);
  const stopped = repeat.stop();
  await jest.advanceTimersByTimeAsync(5 * everyMs);
  await stopped;
});

test('stopping asks the round to end, waits for it, and no round follows', async () => {
  let rounds = 0;
  let asked = false;
  const repeat = new Repeat(
    (signal) => {
      rounds++;
      return new Promise((resolve) =>
        signal.addEventListener('abort', () => {
          asked = true;
          resolve();
        }),
      );
    },
    { everyMs, onError },
  );
  repeat.start(0);
  await jest.advanceTimersByTimeAsync(0);
  await repeat.stop();
  repeat.start(0);
  await jest.advanceTimersByTimeAsync(10 * everyMs);
  expect({ rounds, asked }).toEqual({ rounds: 1, asked: true });
});

test('a repetition that rests wakes up when it is asked, also while its last round still runs', async () => {
  let rounds = 0;
  let end: () => void = () => undefined;
  const repeat = new Repeat(
    async () => {
      rounds++;
      await new Promise<void>((resolve) => (end = resolve));
      return false;
    },
    { everyMs, onError },
  );
  repeat.start(0);
  await jest.advanceTimersByTimeAsync(0);
  repeat.start(50); // something came that this round may not have seen
  end();
  await jest.advanceTimersByTimeAsync(50);
  expect(rounds).toBe(2);
  end();
  await jest.advanceTimersByTimeAsync(10 * everyMs);
  expect(rounds).toBe(2);
  await repeat.stop();
});

test('a round chooses its own pause, and who asks for an earlier round gets it', async () => {
  const at: number[] = [];
  const begun = performance.now();
  const repeat = new Repeat(
    async () => {
      at.push(Math.round(performance.now() - begun));
      return 5 * everyMs;
    },
    { everyMs, onError },
  );
  repeat.start(100);
  await jest.advanceTimersByTimeAsync(200);
  repeat.start(300);
  repeat.start(700);
  await jest.advanceTimersByTimeAsync(300 + 5 * everyMs);
  expect(at).toEqual([100, 500, 5500]);
  await repeat.stop();
});

import { beforeEach, expect, it } from '@jest/globals';
import { Stillness } from '../../src/executions/stillness.js';

const GAP_MS = 750;

let now: number;
let stillness: Stillness;
beforeEach(() => {
  now = 0;
  stillness = new Stillness(GAP_MS, () => now);
});

const look = (sign: string, at: number) => {
  now = at;
  return stillness.look(new Map([['a', sign]])).get('a');
};

it('what shows a change begins anew', () => {
  expect([look('1', 0), look('1', 500), look('2', 1000), look('2', 1500)]).toEqual([0, 500, 0, 500]);
});

it('after a gap between two looks nothing counts as still: nobody may have been able to show a change', () => {
  expect([look('1', 0), look('1', 700), look('1', 1500), look('1', 2000)]).toEqual([0, 700, 0, 500]);
});

it('after a look that failed nothing counts as still', () => {
  look('1', 0);
  stillness.forget();
  expect(look('1', 500)).toBe(0);
});

it('what was away in between begins anew', () => {
  look('1', 0);
  now = 300;
  stillness.look(new Map());
  expect(look('1', 600)).toBe(0);
});

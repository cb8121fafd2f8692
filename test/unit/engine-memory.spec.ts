import { expect, it } from '@jest/globals';
import { OutputMemory } from '../../src/engine/output-memory.js';
import type { HeldOutput } from '../../src/engine/output-memory.js';

const MIB = 2 ** 20;

/** Outputs of one memory that hold so much. */
function outputsOf(memory: OutputMemory, ...held: number[]): HeldOutput[] {
  return held.map((bytes) => {
    const output = memory.open();
    output.add(bytes);
    return output;
  });
}

/** Lets all that can go on do so. */
const settle = () => new Promise((resolve) => setImmediate(resolve));

it('lets an execution hold its share without asking, however much others hold', async () => {
  const memory = new OutputMemory(2 * MIB, 4);
  const [, short] = outputsOf(memory, 64 * MIB, 0.4 * MIB);
  expect(short?.take(0.1 * MIB)).toBeUndefined();
  let isTaken = false;
  void short?.take(0.1 * MIB)?.then(() => (isTaken = true));
  await settle();
  expect(isTaken).toBe(false);
});

it('lets the one that became long first go on, and the next one once that is over', async () => {
  const memory = new OutputMemory(MIB, 1);
  const outputs = outputsOf(memory, 2 * MIB, 2 * MIB, 2 * MIB);
  const goneOn: number[] = [];
  for (const [index, output] of outputs.entries()) {
    const room = output.take(0);
    if (room) void room.then(() => goneOn.push(index));
    else goneOn.push(index);
  }
  for (const output of outputs) {
    await settle();
    output.release();
  }
  await settle();
  expect(goneOn).toEqual([0, 1, 2]);
});

it('counts what is taken when there is room for it, so that those that wait do not take it together', async () => {
  const memory = new OutputMemory(MIB, 1);
  const [first, ...others] = outputsOf(memory, 2 * MIB, 0, 0, 0);
  const taken: number[] = [];
  for (const [index, output] of others.entries()) void output.take(2 * MIB)?.then(() => taken.push(index));
  first?.release();
  await settle();
  expect(taken).toEqual([0]);
  expect(memory.held).toBe(2 * MIB);
  // Who comes later is not before those that wait.
  const late = memory.open();
  late.add(2 * MIB);
  others[0]?.release();
  await settle();
  expect(taken).toEqual([0, 1]);
});

it('counts nothing of what stopped waiting', async () => {
  const memory = new OutputMemory(MIB, 1);
  const [first, stopped, next] = outputsOf(memory, 2 * MIB, 0, 0);
  const stop = new AbortController();
  const ends: string[] = [];
  void stopped?.take(5 * MIB, stop.signal)?.catch((reason: unknown) => ends.push(String(reason)));
  void next?.take(2 * MIB)?.then(() => ends.push('next'));
  stop.abort('stopped');
  await settle();
  first?.release();
  await settle();
  expect(ends).toEqual(['stopped', 'next']);
  expect(memory.held).toBe(2 * MIB);
  await expect(stopped?.take(5 * MIB, stop.signal)).rejects.toBe('stopped');
});

it('knows how much all hold', () => {
  const memory = new OutputMemory(MIB, 1);
  const [first, second] = outputsOf(memory, 10, 5);
  second?.remove(2);
  expect(memory.held).toBe(13);
  for (const output of [first, first, second]) output?.release();
  expect(memory.held).toBe(0);
});

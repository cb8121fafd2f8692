import { describe, expect, it } from '@jest/globals';
import { GroupCommit, MOST_BYTES } from '../../src/database/group-commit.js';
import type { GroupCommitOptions } from '../../src/database/group-commit.js';
import { BUSY } from '../../src/database/isolated-writes.js';
import { NeverWrittenError } from '../../src/database/unavailable.js';

const numbers = (count: number) => Array.from({ length: count }, (_, index) => index);
const refused = () => Object.assign(new Error('invalid input syntax'), { code: '22P02' });
const slow = () => Object.assign(new Error('canceling statement'), { code: '57014' });
const away = () => Object.assign(new Error('shutting down'), { code: '57P01' });

interface Setup<Result> extends Pick<
  GroupCommitOptions<number>,
  'mostItems' | 'bytesOf' | 'keyOf' | 'isolates'
> {
  commit: (items: number[]) => Promise<Result[]>;
  patient?: boolean;
  mostFailures?: number;
}

/** A group commit that keeps what each of its statements was given. */
function begin<Result>({ commit, patient = true, mostFailures, ...options }: Setup<Result | typeof BUSY>) {
  const groups: number[][] = [];
  const ended = new AbortController();
  const patience = { signal: ended.signal, onRetry: () => undefined, mostFailures };
  const writes = new GroupCommit<number, Result>(
    (items) => {
      groups.push(items);
      return commit(items);
    },
    { ...options, patience: patient ? patience : undefined },
  );
  return { writes, groups, end: () => ended.abort(new Error('closed')) };
}

async function settle<Result>(writes: GroupCommit<number, Result>, items: number[]) {
  const settled = await Promise.allSettled(items.map((item) => writes.add(item)));
  return {
    written: items.filter((_item, index) => settled[index]?.status === 'fulfilled'),
    errors: settled.flatMap((one) => (one.status === 'rejected' ? [one.reason as unknown] : [])),
  };
}

describe('a group commit', () => {
  it('refuses only the item that PostgreSQL refuses', async () => {
    const error = refused();
    const { writes, groups } = begin({
      commit: async (items) => {
        if (items.includes(13)) throw error;
        return items;
      },
    });
    const { written, errors } = await settle(writes, numbers(21));
    expect(written).toEqual(numbers(21).filter((item) => item !== 13));
    expect(errors).toEqual([error]);
    expect(groups.length).toBeLessThan(12);
  });

  it('goes on with others while one item meets its time limit again and again', async () => {
    let release = (): void => undefined;
    const held = new Promise<void>((resolve) => (release = resolve));
    let tries = 0;
    const { writes } = begin({
      commit: async (items) => {
        if (!items.includes(3)) return items;
        // The group itself meets its limit; alone the item takes as long as it likes.
        if (items.length > 1) throw slow();
        if (++tries === 1) throw slow();
        await held;
        return items;
      },
    });
    const stuck = writes.add(3);
    const others = numbers(3).map((item) => writes.add(item));
    await Promise.all(others);
    for (const item of numbers(100)) await writes.add(item === 3 ? 200 : item);
    release();
    await expect(stuck).resolves.toBe(3);
  });

  it('gives up an item that never gets in while others do', async () => {
    const { writes } = begin({
      mostFailures: 3,
      commit: async (items) => {
        if (items.includes(3)) throw slow();
        return items;
      },
    });
    let settled = false;
    const stuck = writes.add(3).finally(() => (settled = true));
    stuck.catch(() => undefined);
    while (!settled) {
      await writes.add(1);
      await new Promise((resolve) => setTimeout(resolve, 1));
    }
    await expect(stuck).rejects.toThrow(NeverWrittenError);
  });

  it('repeats a whole group while the database is away, and does not split it', async () => {
    let tries = 0;
    const { writes, groups } = begin({
      commit: async (items) => {
        if (++tries < 3) throw away();
        return items;
      },
    });
    expect((await settle(writes, numbers(5))).written).toEqual(numbers(5));
    expect(groups).toEqual([numbers(5), numbers(5), numbers(5)]);
  });

  it('tries an item again whose row was locked, and settles the others at once', async () => {
    let locked = true;
    const { writes } = begin<number>({
      commit: async (items) => items.map((item) => (item === 2 && locked ? BUSY : item)),
    });
    const busy = writes.add(2);
    await Promise.all([writes.add(0), writes.add(1)]);
    locked = false;
    await expect(busy).resolves.toBe(2);
  });

  it('takes no more bytes than a statement may have, and a larger item alone', async () => {
    const { writes, groups } = begin({
      bytesOf: (item) => (item === 7 ? 3 * MOST_BYTES : MOST_BYTES / 4),
      commit: async (items) => items,
    });
    await settle(writes, numbers(10));
    expect(groups).toContainEqual([7]);
    expect(groups.map((group) => group.length)).toEqual([4, 4, 1, 1]);
  });

  it('keeps the order of what has the same key, also when one of it is tried again', async () => {
    const written: number[] = [];
    let tries = 0;
    const { writes } = begin({
      // 10, 20, 30 … are states of one thing.
      keyOf: (item) => String(item % 10),
      commit: async (items) => {
        if (items.includes(10) && ++tries < 3) throw slow();
        written.push(...items);
        return items;
      },
    });
    const first = writes.add(10);
    await new Promise((resolve) => setImmediate(resolve));
    await Promise.all([first, writes.add(20), writes.add(30), writes.add(1)]);
    expect(written.filter((item) => item % 10 === 0)).toEqual([10, 30]);
  });

  it('without patience hands an outage to every caller, and a defect to one', async () => {
    let isAway = true;
    const { writes, groups } = begin({
      patient: false,
      commit: async (items) => {
        if (isAway) throw away();
        if (items.includes(1)) throw refused();
        return items;
      },
    });
    expect((await settle(writes, numbers(4))).errors).toHaveLength(4);
    expect(groups).toHaveLength(1);
    isAway = false;
    expect((await settle(writes, numbers(4))).written).toEqual([0, 2, 3]);
  });

  it('ends what it still tries when it is closed', async () => {
    const { writes, end } = begin({
      commit: async (items) => {
        if (items.includes(1)) throw slow();
        return items;
      },
    });
    const stuck = writes.add(1);
    stuck.catch(() => undefined);
    await writes.add(2);
    end();
    await expect(stuck).rejects.toThrow('closed');
  });
});

import { afterEach, beforeEach, describe, expect, it, jest } from '@jest/globals';
import { Supervised } from '../../scripts/stack/supervised.mjs';

/** A program without a process: `launched` is what each start waits for, and `end` ends the one that runs. */
class Program extends Supervised {
  readonly said: string[] = [];
  end = () => {};

  constructor(private readonly launched: (program: Program) => Promise<void>) {
    super({ name: 'program', stopMs: 1000, log: (message) => this.said.push(message) });
  }

  override async launch(): Promise<void> {
    const exited = new Promise<void>((resolve) => (this.end = resolve));
    this.begun(
      process.pid,
      exited.then(() => ({ code: 1, signal: null })),
    );
    await this.launched(this);
  }

  /** There is no process to be signalled. */
  override kill(): boolean {
    this.end();
    return true;
  }
}

describe('a supervised program', () => {
  beforeEach(() => void jest.useFakeTimers());
  afterEach(() => void jest.useRealTimers());

  it('that does not last is started again after pauses that double, and says so each time', async () => {
    const program = new Program(async ({ starts, end, exited }) => {
      if (starts === 1) return;
      end();
      await exited;
      throw new Error('it is broken');
    });
    await program.start();
    program.end();

    await jest.advanceTimersByTimeAsync(100 + 200 + 400);

    expect(program.starts).toBe(4);
    expect(program.said).toEqual([
      'program ended with exit code 1. It is started again in 0.1 s.',
      'program did not start: it is broken. It is started again in 0.2 s.',
      'program did not start: it is broken. It is started again in 0.4 s.',
      'program did not start: it is broken. It is started again in 0.8 s.',
    ]);
  });

  it('that has lasted for a while is started again at once', async () => {
    const program = new Program(async () => {});
    await program.start();
    for (const pauseMs of [100, 200, 100]) {
      if (pauseMs === 100) await jest.advanceTimersByTimeAsync(10_000);
      program.end();
      await jest.advanceTimersByTimeAsync(pauseMs);
    }
    expect(program.starts).toBe(4);
  });

  it('that is stopped while it waits for its next start stays stopped', async () => {
    const program = new Program(async () => {});
    await program.start();
    program.end();
    await program.exited;

    await program.stop();

    await jest.advanceTimersByTimeAsync(60_000);
    expect(program.starts).toBe(1);
  });

  it('that is stopped while it starts stays stopped', async () => {
    const program = new Program(async ({ exited }) => {
      await exited;
      throw new Error('ended before it was ready');
    });
    const started = expect(program.start()).rejects.toThrow('ended before it was ready');

    await program.stop();

    await started;
    await jest.advanceTimersByTimeAsync(60_000);
    expect(program.starts).toBe(1);
  });
});

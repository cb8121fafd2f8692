import { Piscina } from 'piscina';
import type { Metrics } from '../metrics.js';
import { EVALUATION_LIMIT_MS, tookTooLong } from './bounds.js';
import { Evaluator, type Evaluated, type EvaluationTask, type Turn } from './evaluation.js';
import type { Began, NumberedTask } from './evaluation.thread.js';
import { Turns } from './turns.js';

/** A thread runs built code, also where this file is run from its source: it lies at the same depth in both folders. */
const THREAD = new URL('../../dist/engine/evaluation.thread.js', import.meta.url);

/** A thread ends what it evaluates by itself. One that does not is in code that only its own end interrupts. */
const KILL_MS = 2 * EVALUATION_LIMIT_MS;
/** What the start of a thread may take on a machine that is busy. */
const START_MS = 30_000;
/** A thread that nobody needs goes, and gives its memory back. */
const IDLE_MS = 60_000;
/** Four times what one evaluation may make and read, in characters of two bytes. */
const HEAP_MB = 256;

interface Waiting extends Turn {
  make: () => EvaluationTask;
  since: number;
  resolve: (evaluated: Evaluated) => void;
  reject: (error: unknown) => void;
}

/** An evaluation in a thread: how it is ended, and what for. */
interface Running {
  thread: AbortController;
  killer: NodeJS.Timeout;
  hasBegun: boolean;
}

export interface EvaluationPoolOptions {
  threads: number;
  budget_ms: number;
  metrics: Metrics;
  /** Hears of threads that ended in a way that they should not. */
  onDefect: (error: unknown) => void;
}

/**
 * Evaluates in a few threads, which begin with the first task. No execution has more than one evaluation here, so there wait
 * as many as executions run in the process, at most; the execution that has taken least comes first.
 */
export class EvaluationPool extends Evaluator {
  readonly budget_ms: number;
  private readonly turns = new Turns();
  private readonly waiting: Waiting[] = [];
  private readonly running = new Map<number, Running>();
  private threads: Piscina<NumberedTask, Evaluated> | undefined;
  private lastId = 0;
  private isClosed = false;

  constructor(private readonly options: EvaluationPoolOptions) {
    super();
    this.budget_ms = options.budget_ms;
  }

  turn(): Promise<void> | undefined {
    return this.turns.wait();
  }

  countInline(): void {
    this.options.metrics.evaluations.inc({ place: 'loop' });
  }

  run(make: () => EvaluationTask, { spent_ms, signal }: Turn): Promise<Evaluated> {
    return new Promise((resolve, reject) => {
      if (this.isClosed) throw new Error('The evaluation of templates and conditions is closed.');
      signal.throwIfAborted();
      const leave = () => {
        const index = this.waiting.indexOf(waiting);
        if (index !== -1) this.waiting.splice(index, 1);
        reject(signal.reason as Error);
      };
      const forget = () => signal.removeEventListener('abort', leave);
      const waiting: Waiting = {
        make,
        spent_ms,
        signal,
        since: performance.now(),
        resolve: (evaluated) => {
          forget();
          resolve(evaluated);
        },
        reject: (error) => {
          forget();
          reject(error as Error);
        },
      };
      signal.addEventListener('abort', leave, { once: true });
      this.waiting.push(waiting);
      this.next();
    });
  }

  /** Ends the threads; what still waits or runs rejects. */
  async close(): Promise<void> {
    this.isClosed = true;
    for (const { reject } of this.waiting.splice(0)) reject(new Error('The server stops.'));
    for (const { thread } of this.running.values()) thread.abort();
    await this.threads?.destroy();
  }

  private next(): void {
    while (!this.isClosed && this.running.size < this.options.threads && this.waiting.length > 0) {
      const first = this.waiting.reduce((a, b) => (b.spent_ms < a.spent_ms ? b : a));
      this.waiting.splice(this.waiting.indexOf(first), 1);
      this.options.metrics.evaluationWait.observe((performance.now() - first.since) / 1000);
      void this.perform(first);
    }
  }

  private async perform({ make, resolve, reject }: Waiting): Promise<void> {
    const id = (this.lastId += 1);
    const running: Running = {
      thread: new AbortController(),
      killer: setTimeout(() => running.thread.abort(), START_MS),
      hasBegun: false,
    };
    this.running.set(id, running);
    try {
      // Copying what is read into the thread takes its time, too.
      await this.turn();
      resolve(this.count(await this.evaluate({ ...make(), id }, running)));
    } catch (error) {
      reject(error);
    } finally {
      clearTimeout(running.killer);
      this.running.delete(id);
      this.next();
    }
  }

  private async evaluate(task: NumberedTask, running: Running): Promise<Evaluated> {
    const { signal } = running.thread;
    try {
      this.threads ??= this.open();
      return await this.threads.run(task, { signal });
    } catch (error) {
      if (this.isClosed) throw error;
      if (isOutOfMemory(error)) {
        return { failure: 'it needs too much memory', limit: 'memory', took_ms: KILL_MS };
      }
      if (running.hasBegun && signal.aborted) {
        return { failure: tookTooLong().message, limit: 'time', took_ms: KILL_MS };
      }
      this.options.onDefect(error);
      return { failure: 'the thread that evaluated it was lost', took_ms: KILL_MS };
    }
  }

  private count(evaluated: Evaluated): Evaluated {
    const { metrics } = this.options;
    metrics.evaluations.inc({ place: 'thread' });
    if ('limit' in evaluated && evaluated.limit) metrics.refusedEvaluations.inc({ limit: evaluated.limit });
    return evaluated;
  }

  private open(): Piscina<NumberedTask, Evaluated> {
    const threads = new Piscina<NumberedTask, Evaluated>({
      filename: THREAD.href,
      minThreads: 0,
      maxThreads: this.options.threads,
      idleTimeout: IDLE_MS,
      atomics: 'disabled',
      recordTiming: false,
      resourceLimits: { maxOldGenerationSizeMb: HEAP_MB, maxYoungGenerationSizeMb: 32 },
      // The environment may hold keys, which nothing that clients write needs to come near.
      env: {},
    });
    threads.on('message', ({ began }: Began) => this.begin(began));
    threads.on('error', (error: unknown) => {
      // One that was ended already can still say so.
      if (isOutOfMemory(error)) return;
      this.options.onDefect(error);
      // A thread that could not start leaves its task waiting.
      for (const { thread, hasBegun } of this.running.values()) if (!hasBegun) thread.abort();
    });
    return threads;
  }

  private begin(id: number): void {
    const running = this.running.get(id);
    if (running === undefined) return;
    clearTimeout(running.killer);
    running.hasBegun = true;
    running.killer = setTimeout(() => running.thread.abort(), KILL_MS);
  }
}

function isOutOfMemory(error: unknown): boolean {
  return error instanceof Error && 'code' in error && error.code === 'ERR_WORKER_OUT_OF_MEMORY';
}

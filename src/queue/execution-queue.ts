/** The reason of a handler's signal when it must let go of its execution: another worker goes on with it. */
export class LockLostError extends Error {
  override name = 'LockLostError';
}

/** What a handler throws that can't take an execution up now. */
export class PutOffError extends Error {
  override name = 'PutOffError';
}

/**
 * Runs one execution to its end; a failed one ends regularly too, with its error in the log. `signal` aborts with a
 * {@link LockLostError} when the process shuts down. One that is not to be run, since it has ended, never was, or runs
 * elsewhere, is dropped by returning at once. Whatever the handler throws, the execution goes back to the head of the queue:
 * after a {@link PutOffError} in a while, and until then it takes no place among those that are worked on.
 */
export type ExecutionHandler = (executionId: string, signal: AbortSignal) => Promise<void>;

/** An execution that the queue has handed to some process. */
export interface Delivery {
  executionId: string;
  /** Stays the same once the process that has it gives no sign of life; one of this build never gives any. */
  sign: string;
}

/**
 * Hands accepted executions to workers in the order in which they were added. It does not find out that a worker has died:
 * who knows that puts its executions back with {@link requeue}.
 */
export abstract class ExecutionQueue {
  /** Puts executions into the queue. Adding one that is already in it, or that a worker has, does nothing. */
  abstract add(executionIds: string[]): Promise<void>;

  /** Takes executions back that were added in vain. One that a worker has stays: it drops it. */
  abstract remove(executionIds: string[]): Promise<void>;

  /** Puts executions at the head of the queue, whichever worker has them. */
  abstract requeue(executionIds: string[]): Promise<void>;

  /** What workers have now, of every build. */
  abstract deliveries(): Promise<Delivery[]>;

  /** Starts to take executions out of the queue, `concurrency` at once, until {@link stop}. */
  abstract process(handler: ExecutionHandler, concurrency: number): void;

  /** Hands out the one that this process has put off for longest, now and not only in a while. */
  abstract resume(): void;

  /** How many executions wait for a worker, and how many a worker has. Rejects when the queue's server can't be reached. */
  abstract size(): Promise<{ waiting: number; active: number }>;

  /** Takes no further execution, gives the running ones `graceMs`, then aborts their signals and hands them back. */
  abstract stop(graceMs: number): Promise<void>;
}

/** The reason of a handler's signal when it must let go of its execution: another worker goes on with it. */
export class LockLostError extends Error {
  override name = 'LockLostError';
}

/**
 * Runs one execution to its end; a failed one ends regularly too, with its error in the log. `signal` aborts with a
 * {@link LockLostError} when the lock is lost or the process shuts down. Whatever the handler throws, the execution
 * goes back to the head of the queue.
 */
export type ExecutionHandler = (executionId: string, signal: AbortSignal) => Promise<void>;

/**
 * Hands accepted executions to workers in the order in which they were added: each to one at a time, and to another one
 * when its worker dies.
 */
export abstract class ExecutionQueue {
  /** Puts executions into the queue. Adding one that is already in it does nothing. */
  abstract add(executionIds: string[]): Promise<void>;

  /** Starts to take executions out of the queue, `concurrency` at once, until {@link stop}. */
  abstract process(handler: ExecutionHandler, concurrency: number): void;

  /** How many executions wait for a worker, and how many a worker has. Rejects when the queue's server can't be reached. */
  abstract size(): Promise<{ waiting: number; active: number }>;

  /** Takes no further execution, gives the running ones `graceMs`, then aborts their signals and hands them back. */
  abstract stop(graceMs: number): Promise<void>;
}

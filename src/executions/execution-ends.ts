import { Injectable } from '@nestjs/common';
import type { Execution } from '../database/entities/execution.entity.js';

/** Tells other parts of the server that an execution, which this process ran or held, has ended. */
@Injectable()
export class ExecutionEnds {
  private readonly handlers: ((execution: Execution) => void)[] = [];

  /** A process that dies between an end and its handlers tells nobody, so they are a wake-up only. They must not throw. */
  handle(handler: (execution: Execution) => void): void {
    this.handlers.push(handler);
  }

  /** `execution` is as it was when it was taken up. */
  tell(execution: Execution): void {
    this.handlers.forEach((handler) => handler(execution));
  }
}

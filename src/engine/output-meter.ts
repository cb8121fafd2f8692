import { OutputLimitError } from '../errors.js';

/** Bytes of JSON in UTF-8 that one agent, and all agents of an execution together, may say: what storing and sending it costs. */
export interface OutputLimits {
  agent: number;
  execution: number;
}

/** Counts what the agents of one execution say. */
export class OutputMeter {
  private total = 0;

  constructor(private readonly limits: OutputLimits) {}

  /** Counts what an earlier attempt has kept. */
  restore(bytes: number): void {
    this.total += bytes;
  }

  /** Throws {@link OutputLimitError} before an agent that has said `said` characters says `more` than it may. */
  add(agentId: string, said: number, more: number): void {
    const { agent, execution } = this.limits;
    if (said + more > agent) {
      throw new OutputLimitError(
        'agent',
        `The agent "${agentId}" says more than ${agent} bytes, which is the limit of an agent.`,
      );
    }
    if (this.total + more > execution) {
      throw new OutputLimitError(
        'execution',
        `The agents of this execution say more than ${execution} bytes together, which is the limit of an execution.`,
      );
    }
    this.total += more;
  }
}

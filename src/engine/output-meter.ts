import { OutputLimitError } from '../errors.js';

/** Characters (UTF-16 code units) that one agent, and all agents of an execution together, may say. */
export interface OutputLimits {
  agent: number;
  execution: number;
}

/** Counts what the agents of one execution say. */
export class OutputMeter {
  private total = 0;

  constructor(private readonly limits: OutputLimits) {}

  /** Counts what an earlier attempt has kept. */
  restore(characters: number): void {
    this.total += characters;
  }

  /** Throws {@link OutputLimitError} before an agent that has said `said` characters says `more` than it may. */
  add(agentId: string, said: number, more: number): void {
    const { agent, execution } = this.limits;
    if (said + more > agent) {
      throw new OutputLimitError(
        'agent',
        `The agent "${agentId}" says more than ${agent} characters, which is the limit of an agent.`,
      );
    }
    if (this.total + more > execution) {
      throw new OutputLimitError(
        'execution',
        `The agents of this execution say more than ${execution} characters together, which is the limit of an execution.`,
      );
    }
    this.total += more;
  }
}

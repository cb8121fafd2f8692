import { OutputLimitError } from '../errors.js';
import { jsonBytes } from '../json-text.js';
import type { HeldOutput } from './output-memory.js';

/** What a piece of text costs in memory besides its bytes, however short it is. */
const PIECE_BYTES = 48;

/** Bytes of JSON in UTF-8 that one agent, and all agents of an execution together, may say, and {@link PIECE_BYTES} for each piece. */
export interface OutputLimits {
  agent: number;
  execution: number;
}

/** Counts what the agents of one execution say. */
export class OutputMeter {
  private total = 0;
  private readonly ofAgents = new Map<string, number>();

  constructor(
    private readonly limits: OutputLimits,
    private readonly held: HeldOutput,
  ) {}

  /** Nothing where there is room to say more, or else a promise for when there is; it rejects with the reason of `signal`. */
  room(signal: AbortSignal): Promise<void> | undefined {
    return this.held.take(0, signal);
  }

  /** Counts what an earlier attempt has kept; `held` has it already. */
  restore(text: string): void {
    this.total += jsonBytes(text);
  }

  /** Counts what an agent says. Throws {@link OutputLimitError} before it says more than it may. */
  add(agentId: string, text: string): void {
    const { agent, execution } = this.limits;
    const bytes = jsonBytes(text) + PIECE_BYTES;
    const said = (this.ofAgents.get(agentId) ?? 0) + bytes;
    if (said > agent) {
      throw new OutputLimitError(
        'agent',
        `The agent "${agentId}" says more than ${agent} bytes, which is the limit of an agent.`,
      );
    }
    if (this.total + bytes > execution) {
      throw new OutputLimitError(
        'execution',
        `The agents of this execution say more than ${execution} bytes together, which is the limit of an execution.`,
      );
    }
    this.ofAgents.set(agentId, said);
    this.total += bytes;
    this.held.add(bytes);
  }
}

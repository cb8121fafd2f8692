import { AppError, OutputLimitError } from '../errors.js';
import type { StepError } from './agents/agent.js';

/** The error of a failed step; a checkpoint may have lost it. */
export function errorOf({ agent_id, error }: { agent_id: string; error?: StepError }): StepError {
  return error ?? { code: 'agent_error', message: `The agent "${agent_id}" failed.` };
}

/** Whatever handles such a failure would meet the same limit. */
export function isLimitOfExecution(error: unknown): boolean {
  if (error instanceof OutputLimitError) return error.limit === 'execution';
  return error instanceof AppError && error.code === 'evaluation_limit';
}

/** What is no `AppError` was not written for clients. */
export function toStepError(error: unknown, agent_id: string): StepError {
  if (error instanceof AppError) return { code: error.code, message: error.message };
  return {
    code: 'agent_error',
    message: `The agent "${agent_id}" failed in a way that it did not expect; the server's log has the details.`,
  };
}

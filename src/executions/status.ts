/**
 * The words for the states of executions, steps and batches, and what SQL needs of them. It imports nothing, and every layer
 * may import it. docs/architecture.md has the diagram.
 */

/** `queued` → `running` → one of {@link TERMINAL_STATUSES}; a lost or handed back execution can be `queued` again. */
export const EXECUTION_STATUSES = ['queued', 'running', 'completed', 'error', 'cancelled'] as const;
export type ExecutionStatus = (typeof EXECUTION_STATUSES)[number];

/** The states in which an execution ends; its last chunk carries the same word. */
export const TERMINAL_STATUSES = ['completed', 'error', 'cancelled'] as const;
export type TerminalStatus = (typeof TERMINAL_STATUSES)[number];

/** The states of a step; it is a checkpoint once it is neither `running` nor `cancelled`. */
export const STEP_STATUSES = ['running', 'completed', 'error', 'skipped', 'cancelled'] as const;
export type StepStatus = (typeof STEP_STATUSES)[number];

export const BATCH_STATUSES = ['running', 'completed', 'cancelled'] as const;
export type BatchStatus = (typeof BATCH_STATUSES)[number];

/** Whether nothing more can happen to an execution. */
export function isFinal(status: ExecutionStatus): status is TerminalStatus {
  return status !== 'queued' && status !== 'running';
}

/** Whether no worker has taken an execution up yet: its log holds `started`, and nothing else. */
export function isUnbegun({ status, attempt }: { status: ExecutionStatus; attempt: number }): boolean {
  return status === 'queued' && attempt === 0;
}

/** Whether a step has come to its end and is not run again by a later attempt. */
export function isCheckpoint<Row extends { status: StepStatus }>(
  step: Row,
): step is Row & { status: Exclude<StepStatus, 'running' | 'cancelled'> } {
  return step.status !== 'running' && step.status !== 'cancelled';
}

// SQL: words as literals, and conditions that stand behind a column `status`.

export const QUEUED = `'queued'`;
export const RUNNING = `'running'`;
export const CANCELLED = `'cancelled'`;

export const IS_QUEUED = `= 'queued'`;
export const IS_RUNNING = `= 'running'`;
export const IS_COMPLETED = `= 'completed'`;
export const IS_ERROR = `= 'error'`;
export const IS_CANCELLED = `= 'cancelled'`;
export const IS_UNFINISHED = `IN ('queued', 'running')`;
/** As {@link isCheckpoint}. */
export const IS_CHECKPOINT = `NOT IN ('running', 'cancelled')`;
export const IS_FINAL = `NOT IN ('queued', 'running')`;

import type { Deployment } from '../database/entities/deployment.entity.js';
import type { Execution } from '../database/entities/execution.entity.js';
import { MOST_LINE_BYTES } from '../line-limit.js';

/** Which changes somebody wants to see; what is absent is not asked for. */
export interface StatusFilter {
  deployment_name?: string;
  environment?: string;
  workflow_id?: string;
  /** Statuses of executions. */
  status?: string[];
  /** The status of deployments is wanted, too. */
  deployments?: boolean;
}

/** A change of status; each comes once, in the order of the sequences, which ascend with gaps. */
export interface StatusChange {
  type: 'execution' | 'deployment';
  deployment_id: string;
  deployment_name: string;
  environment: string;
  workflow_id: string;
  /** Absent if it is the deployment's status. */
  execution_id?: string;
  /** Of an execution as in its state; of a deployment `active`, `inactive` or `deleted`. */
  status: string;
  attempts?: number;
  code?: string;
  sequence: number;
  timestamp: Date;
}

/** An unfinished execution at the moment of a snapshot. */
export type SnapshotExecution = Pick<
  Execution,
  'execution_id' | 'deployment_id' | 'deployment_name' | 'environment' | 'workflow_id' | 'status'
> & { attempts: number; created_at: Date; started_at?: Date };

/** A deployment at the moment of a snapshot. */
export type SnapshotDeployment = Pick<
  Deployment,
  | 'deployment_id'
  | 'deployment_name'
  | 'environment'
  | 'workflow_id'
  | 'status'
  | 'execution_count'
  | 'success_count'
  | 'error_count'
  | 'cancelled_count'
> & { last_executed_at?: Date };

/** How things are at one moment: the changes that follow begin right after `sequence`. */
export interface StatusSnapshot {
  type: 'snapshot';
  sequence: number;
  timestamp: Date;
  /** How many unfinished executions there are. */
  queued: number;
  running: number;
  /** The newest of them, {@link SNAPSHOT_EXECUTIONS} at most and as many as fit into a line. */
  executions: SnapshotExecution[];
  /** Present if deployments are asked for: the newest of them. */
  deployments?: SnapshotDeployment[];
  /** Present if there are more executions or deployments than it holds. */
  items_omitted?: true;
}

export const SNAPSHOT_EXECUTIONS = 1000;

/** Bytes for what of a snapshot is no list. */
const REST_BYTES = 1024;

/** The snapshot without the older executions and deployments that would make its line too long. */
export function fitIntoLine(snapshot: StatusSnapshot): StatusSnapshot {
  const { queued, running } = snapshot;
  const room = MOST_LINE_BYTES - REST_BYTES;
  const newestFirst = snapshot.deployments?.toReversed() ?? [];
  const deployments = takeFitting(newestFirst, room / 2);
  const executions = takeFitting(snapshot.executions, room - deployments.bytes);
  const isWhole =
    executions.taken.length === queued + running && deployments.taken.length === newestFirst.length;
  return {
    ...snapshot,
    executions: executions.taken,
    ...(snapshot.deployments && { deployments: deployments.taken.toReversed() }),
    ...(isWhole ? {} : { items_omitted: true as const }),
  };
}

/** The first of some items whose JSON takes `room` bytes at most. */
function takeFitting<Item>(items: Item[], room: number): { taken: Item[]; bytes: number } {
  let bytes = 0;
  let count = 0;
  for (const item of items) {
    const more = Buffer.byteLength(JSON.stringify(item)) + 1;
    if (bytes + more > room) break;
    bytes += more;
    count += 1;
  }
  return { taken: items.slice(0, count), bytes };
}

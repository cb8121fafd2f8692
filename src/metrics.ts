import { Counter, Gauge, Histogram, Registry, collectDefaultMetrics } from 'prom-client';

/** What `GET /metrics` exposes (Prometheus text format 0.0.4). One instance a process; each app has its own in tests. */
export class Metrics {
  readonly registry = new Registry();

  readonly executions = new Counter({
    name: 'agent_studio_executions_total',
    help: 'Executions by the state that they reached: queued counts each accepted one, the others each end',
    labelNames: ['state'] as const,
    registers: [this.registry],
  });
  readonly runningExecutions = new Gauge({
    name: 'agent_studio_executions_running',
    help: 'Executions that this process runs now',
    registers: [this.registry],
  });
  readonly lostWorkers = new Counter({
    name: 'agent_studio_lost_worker_executions_total',
    help: 'Executions whose worker this process found lost, and put back into the queue',
    registers: [this.registry],
  });
  readonly lostLocks = new Counter({
    name: 'agent_studio_lost_locks_total',
    help: 'Executions that this process had to let go because it could not keep its lease',
    registers: [this.registry],
  });
  readonly refusedExecutions = new Counter({
    name: 'agent_studio_refused_executions_total',
    help: 'Requests that this process refused because too many executions waited',
    registers: [this.registry],
  });
  readonly timeToFirstChunk = new Histogram({
    name: 'agent_studio_time_to_first_chunk_seconds',
    help: 'From accepting an execution to its first committed content chunk',
    buckets: [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60],
    registers: [this.registry],
  });
  readonly executionDuration = new Histogram({
    name: 'agent_studio_execution_duration_seconds',
    help: 'From accepting an execution to its end',
    labelNames: ['state'] as const,
    buckets: [0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600],
    registers: [this.registry],
  });
  readonly evaluations = new Counter({
    name: 'agent_studio_evaluations_total',
    help: 'Templates and conditions that this process evaluated, on its event loop or in a thread',
    labelNames: ['place'] as const,
    registers: [this.registry],
  });
  readonly refusedEvaluations = new Counter({
    name: 'agent_studio_refused_evaluations_total',
    help: 'Evaluations in a thread that went beyond a limit: time, text (the length of one), size (of all it reads and makes) or memory',
    labelNames: ['limit'] as const,
    registers: [this.registry],
  });
  readonly evaluationWait = new Histogram({
    name: 'agent_studio_evaluation_wait_seconds',
    help: 'How long an evaluation waited for a thread',
    buckets: [0.001, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60],
    registers: [this.registry],
  });
  readonly refusedOutputs = new Counter({
    name: 'agent_studio_refused_outputs_total',
    help: 'Outputs that this process ended because they were larger than a limit: agent, execution or provider',
    labelNames: ['limit'] as const,
    registers: [this.registry],
  });
  readonly heldOutput = new Gauge({
    name: 'agent_studio_held_output_bytes',
    help: 'What the executions of this process hold of outputs and prompts; from MAX_PROCESS_OUTPUT_PERCENT of the heap on, long ones wait for each other',
    registers: [this.registry],
  });
  readonly openStreams = new Gauge({
    name: 'agent_studio_open_streams',
    help: 'Event streams that clients hold open at this process',
    registers: [this.registry],
  });
  readonly openWebSockets = new Gauge({
    name: 'agent_studio_open_websockets',
    help: 'WebSockets that clients hold open at this process',
    registers: [this.registry],
  });
  readonly webSocketSubscriptions = new Gauge({
    name: 'agent_studio_websocket_subscriptions',
    help: 'Streams that clients follow on the WebSockets of this process',
    registers: [this.registry],
  });
  readonly droppedConnections = new Counter({
    name: 'agent_studio_dropped_connections_total',
    help: 'Connections that this process closed at once because clients had MAX_CLIENT_CONNECTIONS already',
    registers: [this.registry],
  });
  readonly queueDepth = new Gauge({
    name: 'agent_studio_queue_depth',
    help: 'Executions that wait for a worker, in the whole system',
    registers: [this.registry],
  });
  readonly logFlushDuration = new Histogram({
    name: 'agent_studio_event_log_flush_seconds',
    help: 'One flush of the event log, from the statement to its commit',
    buckets: [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5],
    registers: [this.registry],
  });
  readonly logChunks = new Counter({
    name: 'agent_studio_event_log_chunks_total',
    help: 'Chunks committed to the event log',
    registers: [this.registry],
  });
  readonly logFlushFailures = new Counter({
    name: 'agent_studio_event_log_flush_failures_total',
    help: 'Flushes of the event log that failed and were tried again',
    registers: [this.registry],
  });
  readonly logFlushRows = new Counter({
    name: 'agent_studio_event_log_flush_rows_total',
    help: 'Rows that flushes of the event log wrote, one for each execution that had something to say',
    registers: [this.registry],
  });
  readonly logFlushBytes = new Counter({
    name: 'agent_studio_event_log_flush_bytes_total',
    help: 'Bytes of chunks in the flushes of the event log',
    registers: [this.registry],
  });
  readonly splitGroups = new Counter({
    name: 'agent_studio_split_groups_total',
    help: 'Group commits that failed and were tried again in halves, by what they write: flush, step or end',
    labelNames: ['statement'] as const,
    registers: [this.registry],
  });
  readonly uncountedEnds = new Gauge({
    name: 'agent_studio_uncounted_ends',
    help: 'Ends of executions, in the whole system, that are not added to counters and statistics yet; answers hold them all the same',
    registers: [this.registry],
  });
  readonly uncountedEndsAge = new Gauge({
    name: 'agent_studio_uncounted_ends_age_seconds',
    help: 'How long ago the oldest of them was',
    registers: [this.registry],
  });
  readonly notificationQueueUsage = new Gauge({
    name: 'agent_studio_notification_queue_usage',
    help: 'How full the queue is in which the whole PostgreSQL server keeps notifications, from 0 to 1; at 1 nothing runs',
    registers: [this.registry],
  });
  readonly slowStatementsWaiting = new Gauge({
    name: 'agent_studio_slow_statements_waiting',
    help: 'Statements that may take long and wait for a connection of their own pool',
    registers: [this.registry],
  });
  readonly refusedSlowRequests = new Counter({
    name: 'agent_studio_refused_slow_requests_total',
    help: 'Requests that this process refused because too many waited for those connections, or for too long',
    registers: [this.registry],
  });

  constructor() {
    collectDefaultMetrics({ register: this.registry });
  }
}

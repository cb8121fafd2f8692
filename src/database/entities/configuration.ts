/** The stored shape of a workflow's graph; the engine says what of it is valid. */
export interface WorkflowConfiguration {
  agents: {
    agent_id: string;
    agent_type: string;
    name?: string;
    position?: Record<string, unknown>;
    config: Record<string, unknown>;
  }[];
  connections: {
    source_agent_id: string;
    target_agent_id: string;
    connection_type?: 'default' | 'conditional' | 'error';
    conditions?: { expression?: string };
    priority?: number;
  }[];
  metadata?: Record<string, unknown>;
}

/** How a deployment runs its executions. */
export interface RuntimeConfig {
  /** Seconds that an execution may run, from its first start. */
  timeout?: number;
  /** How often a model call that failed before its first token is repeated. */
  max_retries?: number;
  /** How many executions may run at once, in all processes; the others wait in the order of their arrival. */
  max_concurrency?: number;
  /** How long an execution that asks for `on_disconnect: "cancel"` is kept without a subscriber, in ms. */
  disconnect_grace_ms?: number;
  /** Names of the runtime overrides that callers may use; all of them if absent. */
  allowed_overrides?: string[];
  /** Variables for templates and expressions; the request's win. */
  variables?: Record<string, unknown>;
}

/** What an execution was asked, kept word for word. */
export interface ExecutionInput {
  /** The environment that was asked for; absent if any was meant. */
  environment?: string;
  query: string;
  chat_history: { actor: 'user' | 'assistant' | 'system'; content: string }[];
  runtime_overrides: Record<string, unknown>;
  include: 'progress'[];
  /** What happens when nobody follows the execution any more; absent: it goes on. */
  on_disconnect?: 'continue' | 'cancel';
}

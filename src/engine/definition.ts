import { z } from 'zod';
import type { Fault } from '../errors.js';
import type { ModelRegistry } from '../models/model-registry.js';
import { findUnsafeJson, isForbiddenName, parseShape, refuse, toPointer } from './validation.js';

/** Longest time limit that a definition or a client can ask for, in seconds: one day. */
const MAX_TIMEOUT_S = 86_400;
const MAX_POSITION_CHARS = 1000;

const text = z.string();
const jsonObject = z.record(z.string(), z.unknown());

const agentId = text
  .regex(
    /^[A-Za-z0-9_][A-Za-z0-9_-]{0,99}$/,
    'must be 1 to 100 letters, digits, _ or -, and begin with a letter, a digit or _',
  )
  .refine((id) => !isForbiddenName(id), 'this name is reserved; choose another one');

const agentSchema = z.strictObject({
  agent_id: agentId,
  agent_type: text.min(1).max(100),
  name: text.max(200).optional(),
  /** Where an editor draws the agent; kept as it is. */
  position: jsonObject
    .refine(
      // What is unsafe is refused elsewhere, and can be too deep for JSON.stringify.
      (position) =>
        findUnsafeJson(position, '').length > 0 || JSON.stringify(position).length <= MAX_POSITION_CHARS,
      `must not take more than ${MAX_POSITION_CHARS} characters as JSON`,
    )
    .optional(),
  config: jsonObject,
});

const connectionSchema = z.strictObject({
  source_agent_id: text.min(1).max(100),
  target_agent_id: text.min(1).max(100),
  connection_type: z.enum(['default', 'conditional', 'error']).default('default'),
  conditions: z.strictObject({ expression: text.min(1) }).optional(),
  priority: z.int().min(-1_000_000).max(1_000_000).default(0),
});

/** The shape of a workflow's `configuration`; what its agents and expressions mean is checked when it is compiled. */
export const configurationSchema = z.strictObject({
  agents: z.array(agentSchema).min(1),
  connections: z.array(connectionSchema).default([]),
  metadata: jsonObject.optional(),
});

export type WorkflowConfiguration = z.output<typeof configurationSchema>;
export type AgentDefinition = WorkflowConfiguration['agents'][number];
export type ConnectionDefinition = WorkflowConfiguration['connections'][number];

/** One earlier message of the conversation between a client and the workflow. */
export interface ChatMessage {
  actor: 'user' | 'assistant' | 'system';
  content: string;
}

/** Parameters of a model call that both a definition and a client may set; `timeout` in seconds. */
export const settingSchemas = {
  model: text.min(1).max(200),
  temperature: z.number().min(0).max(2),
  max_tokens: z.int().min(1).max(1_000_000),
  top_p: z.number().min(0).max(1),
  stop: z
    .union([text.min(1).max(500), z.array(text.min(1).max(500)).min(1).max(16)], {
      error: 'must be a text or 1 to 16 texts, each of 1 to 500 characters',
    })
    .transform((stop) => (typeof stop === 'string' ? [stop] : stop)),
  timeout: z.number().positive().max(MAX_TIMEOUT_S),
};

const overrideFields = z.strictObject({ ...settingSchemas, variables: jsonObject }).partial();
const overridesSchema = overrideFields.extend({ agents: z.record(z.string(), overrideFields).optional() });

/** What a request may change for one agent. */
export type AgentOverrides = z.output<typeof overrideFields>;

/** What a request may change: for every agent, and for single ones under `agents`. `timeout` at the top is the run's. */
export type RuntimeOverrides = z.output<typeof overridesSchema>;

export type OverrideField = keyof AgentOverrides;

/** The fields that `runtime_config.allowed_overrides` may name; each one is meant for all agents and for single ones. */
export const OVERRIDE_FIELDS = Object.keys(overrideFields.shape) as readonly OverrideField[];

/** What overrides are checked against. */
export interface OverrideRules {
  agents: { has(agent_id: string): boolean };
  allowed?: readonly string[];
  models: ModelRegistry;
}

export const OVERRIDES_REFUSED = 'The runtime overrides are not allowed';

/**
 * Checks a request's `runtime_overrides` (nothing and `null` count as none). `agents` knows the deployed agents, and
 * `allowed` holds the fields that the deployment allows (all of them if it is left out).
 * Throws `AppError` `override_not_allowed` with every fault, its pointers beginning with `/runtime_overrides`.
 */
export function parseOverrides(value: unknown, options: OverrideRules): RuntimeOverrides {
  const { overrides, faults } = checkOverrides(value, '/runtime_overrides', options);
  refuse('override_not_allowed', OVERRIDES_REFUSED, faults);
  return overrides ?? {};
}

/** As {@link parseOverrides}, but answers with the faults, whose pointers begin with `pointer`. */
export function checkOverrides(
  value: unknown,
  pointer: string,
  options: OverrideRules,
): { overrides?: RuntimeOverrides; faults: Fault[] } {
  const given = value ?? {};
  const faults = findUnsafeJson(given, pointer);
  const overrides = parseShape(overridesSchema, given, { pointer, faults });
  if (overrides !== undefined) {
    const { agents, ...common } = overrides;
    faults.push(...checkFields(common, pointer, options));
    for (const [agent_id, fields] of Object.entries(agents ?? {})) {
      const at = toPointer(pointer, 'agents', agent_id);
      if (!options.agents.has(agent_id)) {
        faults.push({ pointer: at, detail: `the workflow has no agent "${agent_id}"` });
      }
      faults.push(...checkFields(fields, at, options));
    }
  }
  return { overrides, faults };
}

function checkFields(fields: AgentOverrides, pointer: string, options: OverrideRules): Fault[] {
  const faults: Fault[] = [];
  const { allowed } = options;
  for (const field of Object.keys(fields)) {
    if (allowed !== undefined && !allowed.includes(field)) {
      const which = allowed.length === 0 ? 'no overrides' : `only ${allowed.join(', ')}`;
      faults.push({ pointer: toPointer(pointer, field), detail: `this deployment allows ${which}` });
    }
  }
  const problem = fields.model === undefined ? undefined : options.models.check(fields.model);
  if (problem !== undefined) faults.push({ pointer: toPointer(pointer, 'model'), detail: problem });
  return faults;
}

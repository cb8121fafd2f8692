import type { AgentKind } from './agent.js';
import { llmAgent } from './llm.js';
import { templateAgent } from './template.js';

/** Every kind of agent by its `agent_type`: a new kind is one file and one line here. */
export const AGENT_KINDS: ReadonlyMap<string, AgentKind> = new Map([
  ['llm', llmAgent],
  ['template', templateAgent],
]);

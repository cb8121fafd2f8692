import { AppError, type Fault } from '../errors.js';
import type { ModelRegistry } from '../models/model-registry.js';
import type { Agent } from './agents/agent.js';
import { AGENT_KINDS } from './agents/registry.js';
import {
  configurationSchema,
  type AgentDefinition,
  type ConnectionDefinition,
  type WorkflowConfiguration,
} from './definition.js';
import { findCycles, type Edge } from './cycles.js';
import { compileExpression, type Expression } from './expressions.js';
import { atOnce, inTurns, type Pieces } from './turns.js';
import { findUnsafeJson, parseShape, refuse, toPointer } from './validation.js';

const POINTER = '/configuration';
/** More agents of a cycle than this are counted, not named. */
const NAMED_AGENTS = 20;

/** A connection of a compiled graph. */
export type GraphConnection = {
  readonly source_agent_id: string;
  readonly target_agent_id: string;
  readonly priority: number;
} & (
  | { readonly connection_type: 'default' | 'error' }
  | { readonly connection_type: 'conditional'; readonly expression: Expression }
);

/** An agent of a compiled graph; its connections are in the order of their priority, then of the definition. */
export interface GraphAgent {
  readonly agent_id: string;
  readonly agent_type: string;
  readonly name?: string;
  readonly agent: Agent;
  readonly incoming: readonly GraphConnection[];
  readonly outgoing: readonly GraphConnection[];
}

/** A workflow that can run: checked, its templates and expressions compiled. It never changes and serves many runs. */
export class Graph {
  constructor(
    /** By `agent_id`, in the order of the definition. */
    readonly agents: ReadonlyMap<string, GraphAgent>,
    /** The same agents, each after all of its sources. */
    readonly order: readonly GraphAgent[],
  ) {
    Object.freeze(this);
  }

  get total_steps(): number {
    return this.agents.size;
  }

  /** Whether an agent speaks to the client: no default or conditional connection leaves it. */
  answers(agent_id: string): boolean {
    const agent = this.agents.get(agent_id);
    return (
      agent !== undefined && agent.outgoing.every((connection) => connection.connection_type === 'error')
    );
  }
}

/** What a workflow is checked against. */
export interface GraphOptions {
  models: ModelRegistry;
  limits: { maxAgents: number; maxConnections: number };
  /** Whether it was accepted earlier: then it keeps regular expressions of JavaScript that RE2 does not know. */
  stored?: boolean;
}

/**
 * Checks and compiles a workflow's `configuration`.
 * Throws `AppError` `workflow_invalid` with every fault (pointers below `/configuration`): sizes beyond the limits alone,
 * else all faults of the shape, else all of the meaning.
 */
export function compileGraph(configuration: unknown, options: GraphOptions): Graph {
  return atOnce(compileInPieces(configuration, options));
}

/**
 * As {@link compileGraph}, which can take seconds for a definition as large as a request may be: asks `turn` before each
 * piece of it whether to wait.
 */
export function compileGraphInTurns(
  configuration: unknown,
  options: GraphOptions,
  turn: () => Promise<void> | undefined,
): Promise<Graph> {
  return inTurns(compileInPieces(configuration, options), turn);
}

function* compileInPieces(configuration: unknown, options: GraphOptions): Pieces<Graph> {
  const faults = checkLimits(configuration, options.limits);
  refuseWorkflow(faults);
  faults.push(...findUnsafeJson(configuration, POINTER));
  const definition = parseShape(configurationSchema, configuration, { pointer: POINTER, faults });
  refuseWorkflow(faults);
  if (definition === undefined) throw new AppError('workflow_invalid', 'The workflow is not valid.');

  yield;
  const agents = yield* compileAgents(definition.agents, { models: options.models, faults });
  const connections = yield* compileConnections(definition, { stored: options.stored, faults });
  const order = sortAgents(definition, connections, faults);
  refuseWorkflow(faults);
  return link(agents, connections, order);
}

function refuseWorkflow(faults: Fault[]): void {
  refuse('workflow_invalid', 'The workflow is not valid', faults);
}

/** Comes before everything else, so that a huge definition costs nothing. */
function checkLimits(configuration: unknown, limits: GraphOptions['limits']): Fault[] {
  if (typeof configuration !== 'object' || configuration === null) return [];
  const tooMany = (property: string, list: unknown, most: number): Fault[] =>
    Array.isArray(list) && list.length > most
      ? [
          {
            pointer: toPointer(POINTER, property),
            detail: `must have at most ${most} items, and has ${list.length}`,
          },
        ]
      : [];
  return [
    ...tooMany('agents', 'agents' in configuration && configuration.agents, limits.maxAgents),
    ...tooMany(
      'connections',
      'connections' in configuration && configuration.connections,
      limits.maxConnections,
    ),
  ];
}

type UnlinkedAgent = Omit<GraphAgent, 'incoming' | 'outgoing'>;

function* compileAgents(
  definitions: AgentDefinition[],
  { models, faults }: { models: ModelRegistry; faults: Fault[] },
): Pieces<UnlinkedAgent[]> {
  const known = new Set<string>();
  const agents: UnlinkedAgent[] = [];
  for (const [index, { agent_id, agent_type, name, config }] of definitions.entries()) {
    const at = toPointer(POINTER, 'agents', index);
    if (known.has(agent_id)) {
      faults.push({ pointer: toPointer(at, 'agent_id'), detail: `another agent is called "${agent_id}"` });
    }
    known.add(agent_id);
    const kind = AGENT_KINDS.get(agent_type);
    if (kind === undefined) {
      const kinds = [...AGENT_KINDS.keys()].join(', ');
      faults.push({
        pointer: toPointer(at, 'agent_type'),
        detail: `must be one of ${kinds}, and is "${agent_type}"`,
      });
    }
    const agent = kind && (yield* kind.compile(config, { pointer: toPointer(at, 'config'), models, faults }));
    if (agent !== undefined) agents.push(Object.freeze({ agent_id, agent_type, name, agent }));
    yield;
  }
  return agents;
}

/** A connection between two known and different agents, where it stands in the definition. */
interface PlacedConnection {
  index: number;
  /** Absent if the expression of its condition has a fault. */
  compiled?: GraphConnection;
  definition: ConnectionDefinition;
}

/** What connections are compiled with. */
interface ConnectionContext {
  stored?: boolean;
  faults: Fault[];
}

function* compileConnections(
  { agents, connections }: WorkflowConfiguration,
  context: ConnectionContext,
): Pieces<PlacedConnection[]> {
  const known = new Set(agents.map(({ agent_id }) => agent_id));
  const seen = new Map<string, number>();
  const placed: PlacedConnection[] = [];
  const { faults } = context;
  for (const [index, definition] of connections.entries()) {
    yield;
    const at = toPointer(POINTER, 'connections', index);
    const { source_agent_id, target_agent_id, connection_type, conditions } = definition;
    const compiled = compileConnection(definition, at, context);
    const key = JSON.stringify([source_agent_id, target_agent_id, connection_type, conditions?.expression]);
    const first = seen.get(key);
    if (first === undefined) seen.set(key, index);
    else faults.push({ pointer: at, detail: `is the same connection as number ${first} (counted from 0)` });

    const dangling = (['source_agent_id', 'target_agent_id'] as const).filter(
      (end) => !known.has(definition[end]),
    );
    faults.push(
      ...dangling.map((end) => ({
        pointer: toPointer(at, end),
        detail: `there is no agent "${definition[end]}"`,
      })),
    );
    if (dangling.length > 0) continue;
    if (source_agent_id === target_agent_id) {
      faults.push({ pointer: at, detail: `connects "${source_agent_id}" with itself` });
      continue;
    }
    placed.push({ index, compiled, definition });
  }
  return placed;
}

function compileConnection(
  { source_agent_id, target_agent_id, connection_type, conditions, priority }: ConnectionDefinition,
  at: string,
  { stored, faults }: ConnectionContext,
): GraphConnection | undefined {
  const ends = { source_agent_id, target_agent_id, priority };
  const pointer = toPointer(at, 'conditions');
  if (connection_type !== 'conditional') {
    if (conditions === undefined) return Object.freeze({ ...ends, connection_type });
    faults.push({
      pointer,
      detail: `only a conditional connection has conditions, and this one is ${connection_type}`,
    });
    return undefined;
  }
  if (conditions === undefined) {
    faults.push({ pointer, detail: 'a conditional connection needs conditions with an expression' });
    return undefined;
  }
  const expression = compileExpression(conditions.expression, {
    pointer: toPointer(pointer, 'expression'),
    faults,
    stored,
  });
  return expression && Object.freeze({ ...ends, connection_type, expression });
}

/**
 * The `agent_id`s in an order in which each comes after its sources (A. B. Kahn, 1962, doi:10.1145/368996.369025).
 * What can't be ordered lies on a cycle or only behind one; both are faults.
 */
function sortAgents(
  { agents }: WorkflowConfiguration,
  connections: PlacedConnection[],
  faults: Fault[],
): string[] {
  const edges = new Map<string, Edge[]>(agents.map(({ agent_id }) => [agent_id, []]));
  const waiting = new Map(agents.map(({ agent_id }) => [agent_id, 0]));
  for (const { index, definition } of connections) {
    const { source_agent_id, target_agent_id: target } = definition;
    edges.get(source_agent_id)?.push({ index, target });
    waiting.set(target, (waiting.get(target) ?? 0) + 1);
  }
  const order = [...waiting].filter(([, sources]) => sources === 0).map(([agent_id]) => agent_id);
  // The list grows while it is walked: it is the queue and the result in one.
  for (const agent_id of order) {
    waiting.delete(agent_id);
    for (const { target } of edges.get(agent_id) ?? []) {
      const left = (waiting.get(target) ?? 0) - 1;
      waiting.set(target, left);
      if (left === 0) order.push(target);
    }
  }
  if (waiting.size > 0) faults.push(...explainUnordered(agents, { edges, ordered: new Set(order) }));
  return order;
}

/** One fault for each group of agents that wait for each other, and for each other agent that no start leads to. */
function explainUnordered(
  agents: AgentDefinition[],
  { edges, ordered }: { edges: Map<string, Edge[]>; ordered: ReadonlySet<string> },
): Fault[] {
  const left = [...edges].filter(([agent_id]) => !ordered.has(agent_id));
  const cycles = findCycles(new Map(left));
  const onCycle = new Set(cycles.flatMap(({ members }) => members));
  const reached = new Set(ordered);
  // A set is walked in the order of insertion, what is added meanwhile included.
  for (const agent_id of reached) for (const { target } of edges.get(agent_id) ?? []) reached.add(target);

  const unreached = agents.flatMap(({ agent_id }, index) => {
    if (onCycle.has(agent_id) || reached.has(agent_id)) return [];
    const pointer = toPointer(POINTER, 'agents', index);
    return [{ pointer, detail: `"${agent_id}" can't be reached: only a cycle leads to it` }];
  });
  const waiting = cycles.map(({ path, closing }) => ({
    pointer: toPointer(POINTER, 'connections', closing),
    detail: `these agents wait for each other in a cycle: ${listAgents(path)}; remove one of their connections`,
  }));
  return [...waiting, ...unreached];
}

function listAgents(path: string[]): string {
  const more = path.length > NAMED_AGENTS ? ` -> … (${path.length - 1} agents)` : '';
  return path.slice(0, NAMED_AGENTS).join(' -> ') + more;
}

function link(agents: UnlinkedAgent[], connections: PlacedConnection[], order: string[]): Graph {
  const incoming = new Map<string, GraphConnection[]>(agents.map(({ agent_id }) => [agent_id, []]));
  const outgoing = new Map<string, GraphConnection[]>(agents.map(({ agent_id }) => [agent_id, []]));
  // Array.prototype.sort is stable, so connections of one priority stay in the order of the definition.
  const sorted = connections
    .flatMap(({ compiled }) => (compiled === undefined ? [] : [compiled]))
    .sort((a, b) => a.priority - b.priority);
  for (const connection of sorted) {
    outgoing.get(connection.source_agent_id)?.push(connection);
    incoming.get(connection.target_agent_id)?.push(connection);
  }
  const linked = new Map<string, GraphAgent>();
  for (const agent of agents) {
    const { agent_id } = agent;
    linked.set(
      agent_id,
      Object.freeze({
        ...agent,
        incoming: Object.freeze(incoming.get(agent_id) ?? []),
        outgoing: Object.freeze(outgoing.get(agent_id) ?? []),
      }),
    );
  }
  return new Graph(linked, Object.freeze(order.flatMap((agent_id) => linked.get(agent_id) ?? [])));
}

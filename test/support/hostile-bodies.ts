export type Pair = [source: number, target: number];

/** All pairs of agents of a graph that fit. */
export const pairs = (agents: number, fits: (source: number, target: number) => boolean): Pair[] =>
  Array.from({ length: agents ** 2 }, (_, index): Pair => [
    Math.floor(index / agents),
    index % agents,
  ]).filter(([source, target]) => fits(source, target));

/** A workflow of so many template agents, and their connections. */
export const graphOf = (agents: number, connections: Pair[]) => ({
  name: 'graph',
  configuration: {
    agents: Array.from({ length: agents }, (_, index) => ({
      agent_id: `a${index}`,
      agent_type: 'template',
      config: { template: 'x' },
    })),
    connections: connections.map(([source, target]) => ({
      source_agent_id: `a${source}`,
      target_agent_id: `a${target}`,
    })),
  },
});

/** JSON of an object that deep. */
export const nested = (depth: number) => '{"a":'.repeat(depth) + '1' + '}'.repeat(depth);

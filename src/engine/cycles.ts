/** A directed edge; `index` is its place in the caller's list. */
export interface Edge {
  readonly index: number;
  readonly target: string;
}

/** Nodes of which each reaches each other. */
export interface Cycle {
  members: string[];
  /** One way round, its first node again at the end. */
  path: string[];
  /** `index` of the edge that closes `path`. */
  closing: number;
}

interface Visit {
  node: string;
  index: number;
  low: number;
  onStack: boolean;
  nextEdge: number;
}

/**
 * The strongly connected components of more than one node (R. E. Tarjan, 1972, doi:10.1137/0201010), in time linear in
 * the edges and without recursion, since a cycle can be as long as the graph is big. Every edge's target must be a key.
 */
export function findCycles(edges: ReadonlyMap<string, readonly Edge[]>): Cycle[] {
  const visits = new Map<string, Visit>();
  const stack: Visit[] = [];
  const cycles: Cycle[] = [];
  const enter = (node: string): Visit => {
    const visit = { node, index: visits.size, low: visits.size, onStack: true, nextEdge: 0 };
    visits.set(node, visit);
    stack.push(visit);
    return visit;
  };
  for (const root of edges.keys()) {
    const path = visits.has(root) ? [] : [enter(root)];
    for (let visit = path.at(-1); visit !== undefined; visit = path.at(-1)) {
      const edge = edges.get(visit.node)?.[visit.nextEdge];
      if (edge !== undefined) {
        visit.nextEdge += 1;
        const met = visits.get(edge.target);
        if (met === undefined) path.push(enter(edge.target));
        else if (met.onStack) visit.low = Math.min(visit.low, met.index);
        continue;
      }
      path.pop();
      const parent = path.at(-1);
      if (parent !== undefined) parent.low = Math.min(parent.low, visit.low);
      if (visit.low < visit.index) continue;
      const members = popComponent(stack, visit);
      if (members.length > 1) cycles.push(walk(members, edges));
    }
  }
  return cycles;
}

function popComponent(stack: Visit[], root: Visit): string[] {
  const members: string[] = [];
  for (let visit = stack.pop(); visit !== undefined; visit = stack.pop()) {
    visit.onStack = false;
    members.push(visit.node);
    if (visit === root) break;
  }
  return members.reverse();
}

/** Follows edges inside a component until a node comes again; there each node has an edge to follow. */
function walk(members: string[], edges: ReadonlyMap<string, readonly Edge[]>): Cycle {
  const inside = new Set(members);
  const places = new Map<string, number>();
  const path: string[] = [];
  let closing = -1;
  let node = members[0] ?? '';
  while (!places.has(node)) {
    places.set(node, path.length);
    path.push(node);
    const edge = edges.get(node)?.find(({ target }) => inside.has(target));
    if (edge === undefined) break;
    closing = edge.index;
    node = edge.target;
  }
  return { members, path: [...path.slice(places.get(node)), node], closing };
}

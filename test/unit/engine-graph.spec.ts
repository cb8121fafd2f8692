import { describe, expect, it } from '@jest/globals';
import { AppError } from '../../src/errors.js';
import { compileGraph } from '../../src/engine/graph.js';
import { itInFull, rounds } from '../support/effort.js';
import {
  compile,
  connect,
  faultsOf,
  LIMITS,
  llm,
  onError,
  ScriptedModels,
  template,
} from './engine-support.js';

const models = new ScriptedModels();
/** How many faults a hostile body has. */
const MANY = rounds(100_000, 30_000);
const big = { maxAgents: 10_000, maxConnections: 100_000 };

function faultsIn(configuration: unknown, limits = LIMITS) {
  return faultsOf(() => compileGraph(configuration, { models, limits }));
}

describe('the shape of a definition', () => {
  it('accepts one agent without connections', () => {
    const graph = compile([template('only')]);
    expect(graph.total_steps).toBe(1);
    expect(graph.answers('only')).toBe(true);
  });

  it('refuses what is no definition at all', () => {
    for (const configuration of [null, undefined, 5, 'x', [], true]) {
      expect(faultsIn(configuration)).toEqual([{ pointer: '/configuration', detail: expect.any(String) }]);
    }
    expect(faultsIn({})).toEqual([{ pointer: '/configuration/agents', detail: 'is required' }]);
    expect(faultsIn({ agents: [] })).toEqual([
      { pointer: '/configuration/agents', detail: 'must not be empty' },
    ]);
  });

  it('names every fault of the shape with its pointer', () => {
    const faults = faultsIn({
      agents: [
        { agent_id: '-a', agent_type: 5, config: {}, 'a/b~c': 1 },
        { agent_id: 'x'.repeat(101), agent_type: 'llm', config: [], name: 'n'.repeat(201) },
      ],
      connections: [{ source_agent_id: 'a', connection_type: 'maybe', priority: 1.5 }],
      metadata: 7,
      extra: 1,
    });
    expect(Object.fromEntries(faults.map(({ pointer, detail }) => [pointer, detail]))).toEqual({
      '/configuration/agents/0/agent_id': expect.stringContaining('1 to 100 letters'),
      '/configuration/agents/0/agent_type': 'must be a text',
      '/configuration/agents/0/a~1b~0c': 'the property "a/b~c" is not known here',
      '/configuration/agents/1/agent_id': expect.stringContaining('1 to 100 letters'),
      '/configuration/agents/1/config': 'must be an object',
      '/configuration/agents/1/name': 'must have at most 200 characters',
      '/configuration/connections/0/target_agent_id': 'is required',
      '/configuration/connections/0/connection_type': 'must be one of default, conditional, error',
      '/configuration/connections/0/priority': 'must be a whole number',
      '/configuration/metadata': 'must be an object',
      '/configuration/extra': 'the property "extra" is not known here',
    });
  });

  it('says the first fault and how many there are in the message', () => {
    expect(() => compileGraph({ agents: 1, metadata: 1 }, { models, limits: LIMITS })).toThrow(
      'The workflow is not valid: /configuration/agents must be an array (and 1 more).',
    );
  });

  it('refuses prototype keys at any depth, and pollutes nothing', () => {
    const hostile: unknown = JSON.parse(`{
      "agents": [{"agent_id": "a", "agent_type": "template", "config": {"template": "", "constructor": {}}, "__proto__": {"polluted": 1}}],
      "metadata": {"deep": [{"prototype": 1}]},
      "__proto__": {"polluted": 1}
    }`);
    expect(
      faultsIn(hostile)
        .map(({ pointer }) => pointer)
        .sort(),
    ).toEqual([
      '/configuration/__proto__',
      '/configuration/agents/0/__proto__',
      '/configuration/agents/0/config/constructor',
      '/configuration/metadata/deep/0/prototype',
    ]);
    for (const name of ['__proto__', 'constructor', 'prototype']) {
      expect(faultsIn({ agents: [template(name)] })).toHaveLength(1);
    }
    expect(({} as Record<string, unknown>)['polluted']).toBeUndefined();
  });

  it('does not answer a hostile body with faults without end', () => {
    const unknown = Object.fromEntries(Array.from({ length: MANY }, (_, n) => [`x${n}`, 1]));
    expect(faultsIn({ agents: [{ ...template('a'), ...unknown }] })).toHaveLength(100);
    expect(() => compile([{ ...template('a'), ...unknown }])).toThrow(`(and ${MANY - 1} more)`);
    const forbidden = Array.from({ length: MANY }, () => ({ prototype: 1 }));
    expect(faultsIn({ agents: [template('a')], metadata: { forbidden } })).toHaveLength(100);
  });

  it('keeps position and metadata of any kind, but no big position', () => {
    expect(() =>
      compileGraph(
        {
          agents: [{ ...template('a'), position: { x: 1, y: -2.5, view: { zoom: 1 } } }],
          metadata: { tags: ['a', null, { b: 1 }] },
        },
        { models, limits: LIMITS },
      ),
    ).not.toThrow();
    expect(faultsIn({ agents: [{ ...template('a'), position: { x: 'x'.repeat(1000) } }] })).toEqual([
      { pointer: '/configuration/agents/0/position', detail: expect.stringContaining('1000 characters') },
    ]);
  });

  it('survives nesting that would overflow the stack', () => {
    for (const property of ['metadata', 'position', 'config']) {
      const deep: unknown = JSON.parse('{"a":'.repeat(6000) + '1' + '}'.repeat(6000));
      const agent = { ...template('a'), ...(property === 'metadata' ? {} : { [property]: deep }) };
      const faults = faultsIn({ agents: [agent], ...(property === 'metadata' && { metadata: deep }) });
      expect(faults[0]?.detail).toBe('is nested more than 256 levels deep');
    }
  });

  it('refuses too many agents or connections before it looks at any of them', () => {
    const configuration = {
      agents: Array.from({ length: 200_000 }),
      connections: Array.from({ length: 300_000 }),
    };
    expect(faultsIn(configuration)).toEqual([
      { pointer: '/configuration/agents', detail: 'must have at most 100 items, and has 200000' },
      { pointer: '/configuration/connections', detail: 'must have at most 1000 items, and has 300000' },
    ]);
  });
});

describe('the meaning of a definition', () => {
  it('lists the faults of all kinds at once', () => {
    const faults = faultsIn({
      agents: [
        template('a'),
        template('a'),
        { agent_id: 'b', agent_type: 'toString', config: {} },
        { agent_id: 'c', agent_type: 'llm', config: { model: 'nowhere/m', temperature: 3, api_key: 'x' } },
        template('d', '{{ query | nope }}'),
        llm('e', 'e', { system_prompt: '{% include "/etc/passwd" %}' }),
        { agent_id: 'f', agent_type: 'llm', config: { model: 'nowhere/m' } },
      ],
      connections: [
        connect('a', 'ghost'),
        connect('a', 'a'),
        connect('a', 'd'),
        connect('a', 'd'),
        connect('a', 'd', 'query =='),
        connect('a', 'd', { connection_type: 'conditional' }),
        connect('a', 'e', { conditions: { expression: 'true' } }),
        connect('d', 'f'),
        connect('f', 'd'),
      ],
    });
    expect(faults.map(({ pointer, detail }) => `${pointer}: ${detail}`)).toEqual([
      '/configuration/agents/1/agent_id: another agent is called "a"',
      '/configuration/agents/2/agent_type: must be one of llm, template, and is "toString"',
      '/configuration/agents/3/config/temperature: must be at most 2',
      '/configuration/agents/3/config/api_key: the property "api_key" is not known here',
      expect.stringContaining(
        '/configuration/agents/4/config/template: the template is not valid: undefined filter: nope',
      ),
      expect.stringContaining(
        '/configuration/agents/5/config/system_prompt: the template is not valid: tag "include" not found',
      ),
      '/configuration/agents/6/config/model: there is no provider for "nowhere/m"',
      '/configuration/connections/0/target_agent_id: there is no agent "ghost"',
      '/configuration/connections/1: connects "a" with itself',
      '/configuration/connections/3: is the same connection as number 2 (counted from 0)',
      expect.stringContaining(
        '/configuration/connections/4/conditions/expression: the expression is not valid: Unexpected token',
      ),
      '/configuration/connections/5/conditions: a conditional connection needs conditions with an expression',
      '/configuration/connections/6/conditions: only a conditional connection has conditions, and this one is default',
      '/configuration/connections/8: these agents wait for each other in a cycle: d -> f -> d; remove one of their connections',
    ]);
  });

  it('allows several connections between two agents when they differ', () => {
    expect(() =>
      compile(
        [template('a'), template('b')],
        [connect('a', 'b'), onError('a', 'b'), connect('a', 'b', 'true'), connect('a', 'b', 'false')],
      ),
    ).not.toThrow();
    expect(
      faultsOf(() =>
        compile([template('a'), template('b')], [connect('a', 'b', { priority: 1 }), connect('a', 'b')]),
      ),
    ).toHaveLength(1);
  });

  it('allows an agent without any connection beside others', () => {
    const graph = compile([template('a'), template('b'), template('lone')], [connect('a', 'b')]);
    expect(graph.answers('lone')).toBe(true);
  });

  it('names each cycle, and agents that only a cycle leads to', () => {
    const ids = ['start', 'a', 'b', 'c', 'behind', 'x', 'y', 'lost', 'end'];
    const faults = faultsIn({
      agents: ids.map((id) => template(id)),
      connections: [
        connect('start', 'a'),
        connect('a', 'b'),
        connect('b', 'c'),
        connect('c', 'a'),
        connect('c', 'behind'),
        connect('x', 'y'),
        connect('y', 'x'),
        connect('y', 'lost'),
        connect('lost', 'end'),
        connect('start', 'end'),
      ],
    });
    const details = faults.map(({ detail }) => detail);
    expect(details).toHaveLength(3);
    expect(details[0]).toContain('a -> b -> c -> a');
    expect(details[1]).toContain('x -> y -> x');
    expect(faults[2]).toEqual({
      pointer: '/configuration/agents/7',
      detail: `"lost" can't be reached: only a cycle leads to it`,
    });
  });

  it('survives a cycle and a chain as long as the limits allow', () => {
    const length = rounds(10_000, 1000);
    const ids = Array.from({ length }, (_, index) => `n${index}`);
    const agents = ids.map((id) => template(id, ''));
    const chain = ids.slice(1).map((id, index) => connect(`n${index}`, id));
    const graph = compile(agents, chain, { limits: big });
    expect(graph.order.map(({ agent_id }) => agent_id)).toEqual(ids);

    const faults = faultsIn({ agents, connections: [...chain, connect(`n${length - 1}`, 'n0')] }, big);
    expect(faults).toHaveLength(1);
    expect(faults[0]?.pointer).toBe(`/configuration/connections/${length - 1}`);
    expect(faults[0]?.detail).toContain('n0 -> n1 -> n2');
    expect(faults[0]?.detail).toContain(`(${length} agents)`);
    expect(faults[0]?.detail.length).toBeLessThan(400);
  });

  itInFull('survives dense graphs, with and without a cycle', () => {
    const ids = Array.from({ length: 400 }, (_, index) => `n${index}`);
    const agents = ids.map((id) => template(id, ''));
    const connections = ids.flatMap((source, from) =>
      ids.slice(from + 1, from + 251).map((target) => connect(source, target)),
    );
    expect(connections.length).toBeGreaterThan(60_000);
    expect(compile(agents, connections, { limits: big }).total_steps).toBe(400);
    const faults = faultsIn({ agents, connections: [...connections, connect('n399', 'n0')] }, big);
    expect(faults).toHaveLength(1);
  });

  itInFull('survives ten thousand conditions', () => {
    const connections = Array.from({ length: 10_000 }, (_, index) =>
      connect('a', 'b', `size(output) > ${index}`),
    );
    const graph = compile([template('a'), template('b')], connections, { limits: big });
    expect(graph.agents.get('a')?.outgoing).toHaveLength(10_000);
  });
});

describe('a compiled graph', () => {
  const graph = compile(
    [template('z'), template('a'), template('m')],
    [
      connect('z', 'm', { priority: 5 }),
      connect('a', 'm', { priority: 1 }),
      connect('z', 'a', { priority: 1, connection_type: 'error' }),
      connect('z', 'm', { connection_type: 'conditional', conditions: { expression: 'true' }, priority: 1 }),
    ],
  );

  it('keeps agents in the order of the definition and connections in that of their priority', () => {
    expect([...graph.agents.keys()]).toEqual(['z', 'a', 'm']);
    expect(graph.order.map(({ agent_id }) => agent_id)).toEqual(['z', 'a', 'm']);
    expect(graph.agents.get('m')?.incoming.map((c) => `${c.source_agent_id}${c.priority}`)).toEqual([
      'a1',
      'z1',
      'z5',
    ]);
    expect(graph.agents.get('z')?.outgoing.map((c) => `${c.target_agent_id}${c.priority}`)).toEqual([
      'a1',
      'm1',
      'm5',
    ]);
  });

  it('lets an agent answer when only error connections leave it', () => {
    const fallback = compile([template('a'), template('b')], [onError('a', 'b')]);
    expect([fallback.answers('a'), fallback.answers('b'), fallback.answers('nobody')]).toEqual([
      true,
      true,
      false,
    ]);
    expect([graph.answers('z'), graph.answers('a'), graph.answers('m')]).toEqual([false, false, true]);
  });

  it('can not be changed', () => {
    const agent = graph.agents.get('m');
    for (const part of [graph, agent, agent?.incoming, agent?.outgoing, agent?.incoming[0], graph.order]) {
      expect(Object.isFrozen(part)).toBe(true);
    }
  });

  it('answers an invalid definition with status 422', () => {
    expect.assertions(1);
    try {
      compile([]);
    } catch (error) {
      expect(error instanceof AppError && error.status).toBe(422);
    }
  });
});

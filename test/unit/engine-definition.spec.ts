import { describe, expect, it } from '@jest/globals';
import { AppError } from '../../src/errors.js';
import { OVERRIDE_FIELDS, parseOverrides } from '../../src/engine/definition.js';
import { compile, faultsOf, llm, ScriptedModels, template } from './engine-support.js';

const models = new ScriptedModels();
const graph = compile([llm('writer'), template('toString')]);

function parse(value: unknown, allowed?: string[]) {
  return parseOverrides(value, { agents: graph.agents, allowed, models });
}

function faultsIn(value: unknown, allowed?: string[]) {
  return faultsOf(() => parse(value, allowed), 'override_not_allowed').map(
    ({ pointer, detail }) => `${pointer}: ${detail}`,
  );
}

describe('runtime overrides', () => {
  it('take every field, for all agents and for single ones', () => {
    const fields = {
      model: 'test/m',
      temperature: 0,
      max_tokens: 1,
      top_p: 1,
      stop: ['a', 'b'],
      timeout: 0.5,
      variables: { a: [1] },
    };
    expect(Object.keys(fields).sort()).toEqual([...OVERRIDE_FIELDS].sort());
    const value = { ...fields, agents: { writer: fields, toString: { temperature: 1 } } };
    expect(parse(value)).toEqual(value);
  });

  it('may be missing', () => {
    for (const nothing of [undefined, null, {}]) expect(parse(nothing)).toEqual({});
  });

  it('turn a single stop text into a list', () => {
    expect(parse({ stop: 'END' })).toEqual({ stop: ['END'] });
  });

  it('refuse everything that is not on the whitelist', () => {
    expect(
      faultsIn({
        system_prompt: 'x',
        base_url: 'http://x',
        agents: { writer: { template: 'x', agents: {} } },
      }),
    ).toEqual([
      '/runtime_overrides/agents/writer/template: the property "template" is not known here',
      '/runtime_overrides/agents/writer/agents: the property "agents" is not known here',
      '/runtime_overrides/system_prompt: the property "system_prompt" is not known here',
      '/runtime_overrides/base_url: the property "base_url" is not known here',
    ]);
  });

  it('refuse wrong types and ranges', () => {
    for (const value of [5, 'x', [], true])
      expect(faultsIn(value)).toEqual(['/runtime_overrides: must be an object']);
    const wrong: [string, unknown[]][] = [
      ['model', [1, '', 'x'.repeat(201), null]],
      ['temperature', [-0.1, 2.1, '1', null, NaN, Infinity]],
      ['max_tokens', [0, 1.5, 1_000_001, '5']],
      ['top_p', [-1, 1.01, '1']],
      ['stop', [5, '', [], [''], [1], Array.from('a'.repeat(17)), null]],
      ['timeout', [0, -1, 86_401, '5', null]],
      ['variables', [[], 'x', 5, null]],
      ['agents', [[], 'x', { writer: 5 }, { writer: null }]],
    ];
    for (const [field, values] of wrong) {
      for (const value of values) {
        const faults = faultsIn({ [field]: value });
        expect(faults).toHaveLength(1);
        expect(faults[0]).toMatch(new RegExp(`^/runtime_overrides/${field}`));
      }
    }
  });

  it('refuse agents that the workflow has not, and providers that the server has not', () => {
    expect(
      faultsIn({ model: 'nowhere/m', agents: { ghost: {}, writer: { model: 'elsewhere/m' }, valueOf: {} } }),
    ).toEqual([
      '/runtime_overrides/model: there is no provider for "nowhere/m"',
      '/runtime_overrides/agents/ghost: the workflow has no agent "ghost"',
      '/runtime_overrides/agents/writer/model: there is no provider for "elsewhere/m"',
      '/runtime_overrides/agents/valueOf: the workflow has no agent "valueOf"',
    ]);
  });

  it('refuse fields that the deployment does not allow, wherever they stand', () => {
    const allowed = ['temperature', 'variables'];
    expect(parse({ temperature: 1, agents: { writer: { variables: { a: 1 } } } }, allowed)).toBeDefined();
    expect(faultsIn({ model: 'test/m', agents: { writer: { top_p: 1, temperature: 1 } } }, allowed)).toEqual([
      '/runtime_overrides/model: this deployment allows only temperature, variables',
      '/runtime_overrides/agents/writer/top_p: this deployment allows only temperature, variables',
    ]);
    expect(faultsIn({ temperature: 1 }, [])).toEqual([
      '/runtime_overrides/temperature: this deployment allows no overrides',
    ]);
  });

  it('refuse prototype keys at any depth, and pollute nothing', () => {
    const hostile: unknown = JSON.parse(`{
      "__proto__": {"polluted": 1}, "constructor": {"prototype": {"polluted": 1}},
      "variables": {"a": [{"b": {"__proto__": {"polluted": 1}}}], "prototype": 1},
      "agents": {"__proto__": {"model": "test/m"}, "writer": {"constructor": 1}}
    }`);
    expect(
      faultsIn(hostile)
        .map((fault) => fault.split(':')[0])
        .sort(),
    ).toEqual([
      '/runtime_overrides/__proto__',
      '/runtime_overrides/agents/__proto__',
      '/runtime_overrides/agents/writer/constructor',
      '/runtime_overrides/constructor',
      '/runtime_overrides/variables/a/0/b/__proto__',
      '/runtime_overrides/variables/prototype',
    ]);
    expect(({} as Record<string, unknown>)['polluted']).toBeUndefined();
  });

  it('survive nesting that would overflow the stack', () => {
    const deep: unknown = JSON.parse('{"variables":' + '{"a":'.repeat(6000) + '1' + '}'.repeat(6001));
    expect(faultsIn(deep)[0]).toMatch(/is nested more than 256 levels deep$/);
  });

  it('are answered with status 400 and the first fault', () => {
    expect.assertions(2);
    try {
      parse({ a: 1, b: 2 });
    } catch (error) {
      expect(error instanceof AppError && error.status).toBe(400);
      expect(error instanceof AppError && error.message).toBe(
        'The runtime overrides are not allowed: /runtime_overrides/a the property "a" is not known here (and 1 more).',
      );
    }
  });
});

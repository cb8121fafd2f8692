import { describe, expect, it } from '@jest/globals';
import type { Fault } from '../../src/errors.js';
import { compileExpression, toExpressionVariables } from '../../src/engine/expressions.js';
import { evaluations } from './engine-support.js';

async function holds(
  source: string,
  input: { query?: string; output?: string; variables?: Record<string, unknown> } = {},
): Promise<boolean> {
  const faults: Fault[] = [];
  const expression = compileExpression(source, { pointer: '/e', faults });
  if (expression === undefined) throw new Error(faults[0]?.detail);
  const { query = 'q', output = 'out', variables = {} } = input;
  return expression.holds({ query, output, variables: toExpressionVariables(variables) }, evaluations());
}

function faultIn(source: string): string {
  const faults: Fault[] = [];
  expect(compileExpression(source, { pointer: '/e', faults })).toBeUndefined();
  expect(faults).toEqual([
    { pointer: '/e', detail: expect.stringMatching(/^the expression is not valid: /) },
  ]);
  return faults[0]?.detail ?? '';
}

describe('a condition', () => {
  it('reads query, output and variables with the functions of CEL', async () => {
    const input = {
      query: 'Where is my order?',
      output: 'REFUND: yes\nurgent',
      variables: { plan: 'pro', seats: 3, tags: ['vip', 'eu'], flag: true, user: { age: 20 } },
    };
    for (const source of [
      'output.contains("REFUND")',
      'output.startsWith("REFUND") && output.endsWith("urgent")',
      'output.matches("^REFUND: (yes|no)")',
      'query.lowerAscii().contains("order")',
      'variables.plan == "pro"',
      'variables.seats == 3 && variables.seats > 2 && variables.seats < 3.5',
      'variables.user.age >= 18',
      '"vip" in variables.tags',
      'variables.tags.exists(t, t == "eu") && variables.tags.all(t, size(t) > 1)',
      'has(variables.plan) && !has(variables.missing)',
      'variables.flag',
      'size(output) + 1 > 5',
      'int(variables.seats) + 1 == 4',
      'output.split("\\n").size() == 2',
      'size(output) > 100 ? false : true',
      '!(output == query)',
    ]) {
      expect([source, await holds(source, input)]).toEqual([source, true]);
    }
    expect(await holds('output == "other"')).toBe(false);
  });

  it('is refused when it can not be parsed', () => {
    for (const source of ['1 +', 'output ==', '(', 'output..x', 'a b', '"open', "output.matches('(')"])
      faultIn(source);
    expect(faultIn('1 +')).toContain('Unexpected token: EOF');
    expect(faultIn("output.matches('(')")).toContain('"(" is no regular expression of RE2');
  });

  it('is refused when its names or types are wrong', () => {
    expect(faultIn('outptu == "x"')).toContain('Unknown variable: outptu');
    expect(faultIn('output == 5')).toContain('no such overload');
    expect(faultIn('output')).toContain('it gives string, and must give bool');
    expect(faultIn('size(output)')).toContain('it gives int');
    expect(faultIn('process.exit()')).toContain('the function "exit" is not known here');
    expect(faultIn('output.constructor("return 1")() == 1')).toContain('not valid');
    expect(faultIn('output.contains(5)')).toContain("no matching overload for 'string.contains(int)'");
    expect(faultIn('output.bounded_contains("x")')).toContain('"bounded_contains" is not known');
  });

  it('is refused when it is too long or too deep', async () => {
    expect(faultIn(`output == "${'x'.repeat(2000)}"`)).toContain('longer than 2000 characters');
    for (const source of [
      '('.repeat(900) + 'true' + ')'.repeat(900),
      '['.repeat(240) + ']'.repeat(240) + ' == []',
    ]) {
      faultIn(source);
    }
    expect(await holds('!'.repeat(1900) + 'true')).toBe(true);
  });

  it('fails the run, not the process, on data that do not fit', async () => {
    const failing: [string, RegExp, Record<string, unknown>][] = [
      ['variables.missing == 1', /No such key: missing/, {}],
      ['variables.constructor == 1', /No such key: constructor/, {}],
      ['variables.__proto__ == 1', /No such key: __proto__/, {}],
      ['variables.flag', /neither true nor false/, { flag: 'yes' }],
      ['variables.text.contains("a")', /no matching overload/, { text: 5 }],
      ['1 / size(variables.list) == 1', /division by zero/, { list: [] }],
      ['output.matches(variables.pattern)', /"\(" is no regular expression of RE2/, { pattern: '(' }],
      ['variables.a + 1 == 2', /no such overload/, { a: 'x' }],
    ];
    for (const [source, message, variables] of failing)
      await expect(holds(source, { variables })).rejects.toThrow(message);
  });

  it('takes linear time for a regular expression that would take exponential time in JavaScript', async () => {
    const output = 'a'.repeat(60) + 'b';
    expect(await holds('output.matches("^(a+)+$")', { output })).toBe(false);
    expect(await holds('output.matches(variables.p)', { output, variables: { p: '(a|a?)+$' } })).toBe(true);
    expect(await holds('output.matches("^a+b$")', { output })).toBe(true);
    expect(await holds(String.raw`output.matches("^\\p{L}+$")`, { output: 'Grüße' })).toBe(true);
  });

  it('is refused when its regular expression is not one of RE2, saying why', () => {
    expect(faultIn('output.matches("^(?!x)a")')).toContain(
      'it has no lookahead, lookbehind or backreference',
    );
    expect(faultIn('output.matches("(?<=x)a")')).toContain(
      'it has no lookahead, lookbehind or backreference',
    );
    expect(faultIn(String.raw`output.matches("(a)\\1")`)).toContain('it has no lookahead');
    expect(faultIn('output.matches("(abcdefghijkl){1000}")')).toContain('repeats too much of itself');
    expect(faultIn('output.matches("((abcdefghijkl){10}){100}")')).toContain('repeats too much of itself');
    // To compile them takes most of a second, in which nobody else comes by.
    for (const [name, classes] of [
      ['classes whose other cases are looked for', `(?i)[${'\\pL'.repeat(640)}]`],
      ['what is not in a class', `(?i)[${'\\PL'.repeat(640)}]`],
      ['ranges', `(?i)[${'B-\u{1e942}'.repeat(400)}]`],
      ['ranges beside a class of POSIX', `(?i)[[:alpha:]${'B-\u{1e942}'.repeat(400)}]`],
      ['ranges of numbers', `(?i)[${'\\x{42}-\\x{1e942}'.repeat(90)}]`],
    ])
      expect([name, faultIn(`output.matches(r"${classes}")`)]).toEqual([
        name,
        expect.stringContaining('take too long to compile'),
      ]);
    for (const ordinary of [
      String.raw`(?i)^[a-zà-ÿ0-9._-]+@[a-zà-ÿ0-9-]+(\.[a-zà-ÿ0-9-]+)*$`,
      String.raw`(?i)^[\p{L}\p{M}' -]{1,100}$`,
      `(?i)${'[à-ÿ]'.repeat(50)}`,
    ])
      expect(compileExpression(`output.matches(r"${ordinary}")`, { pointer: '', faults: [] })).toBeDefined();
    const written = Array.from({ length: 50 }, (_, index) => `output.matches(r"(\\pL{31}){31}${index}")`);
    expect(faultIn(written.join('||'))).toContain('its regular expressions take too long to compile');
  });

  it('keeps a regular expression of JavaScript where it was accepted with it, and ends it in time', async () => {
    const at = { pointer: '', faults: [], stored: true };
    const lookahead = compileExpression('output.matches("^(?!x)a")', at);
    const input = (output: string) => ({ query: '', output, variables: {} });
    expect(await lookahead?.holds(input('abc'), evaluations())).toBe(true);
    expect(await lookahead?.holds(input('xa'), evaluations())).toBe(false);
    const exponential = compileExpression('output.matches("^(?=a)(a+)+$")', at);
    await expect(exponential?.holds(input('a'.repeat(60) + 'b'), evaluations())).rejects.toThrow(
      'it takes longer than 500 ms',
    );
    expect(await exponential?.holds(input('aaa'), evaluations())).toBe(true);
    // What comes out of data was not accepted by anybody.
    const fromData = compileExpression('output.matches(variables.p)', at);
    await expect(
      fromData?.holds({ query: '', output: '', variables: { p: '(?=a)' } }, evaluations()),
    ).rejects.toThrow('is no regular expression of RE2');
    await expect(
      fromData?.holds({ query: '', output: '', variables: { p: 'a'.repeat(2001) } }, evaluations()),
    ).rejects.toThrow('a regular expression is longer than 2000 characters');
  });

  it('refuses searches that nothing could interrupt', async () => {
    const variables = { part: 'a'.repeat(100_000) + 'b' + 'a'.repeat(100_000) };
    const query = 'a'.repeat(400_000);
    for (const source of [
      'query.contains(variables.part)',
      'query.indexOf(variables.part) > 0',
      'query.split(variables.part).size() > 1',
      'query.matches(variables.part)',
    ]) {
      await expect(holds(source, { query, variables })).rejects.toThrow(
        'it searches a text of 400000 characters for one of 200001',
      );
    }
    expect(await holds('query.contains("aa") && query.indexOf("aa") == 0', { query })).toBe(true);
  });

  it('is ended when its macros multiply', async () => {
    const list = Array.from({ length: 1000 }, (_, index) => index);
    const source = 'variables.l.all(a, variables.l.all(b, variables.l.all(c, a + 1.0 > b - c - 1e9)))';
    await expect(holds(source, { variables: { l: list } })).rejects.toThrow('500 ms');
    expect(await holds('variables.l.all(a, a >= 0)', { variables: { l: list } })).toBe(true);
  });

  it('can not build values that grow with every operation', () => {
    expect(faultIn('[output].map(a, a + a).map(a, a + a)[0].size() > 1')).toContain('+ adds numbers only');
    expect(faultIn('[[1] + [1]] == []')).toContain('+ adds numbers only');
    expect(faultIn('cel.bind(a, output, a.size() > 1)')).toContain('"bind" is not known');
    expect(faultIn('[output, output].join("") == ""')).toContain('"join" is not known');
    expect(faultIn('bytes(output).hex() == ""')).toContain('is not known');
    expect(faultIn('[[[[1]]]] == []')).toContain('nested too deeply');
    expect(faultIn('[1].map(a, [1].map(b, [1].map(c, [1].map(d, d)))) == []')).toContain('nested too deeply');
  });

  it('sees variables as they are down to the fourth level, and null below', async () => {
    const variables = { a: { b: { c: { d: { e: 1 } } } }, text: 'x'.repeat(10) };
    expect(await holds('variables.a.b.c.d == null || has(variables.a.b.c.d.e)', { variables })).toBe(true);
    expect(toExpressionVariables(variables)).toEqual({
      a: { b: { c: { d: { e: 1 } } } },
      text: 'xxxxxxxxxx',
    });
    expect(toExpressionVariables({ l: [[[[[1]]]]] })).toEqual({ l: [[[[null]]]] });
    const own: unknown = JSON.parse('{"__proto__": {"polluted": 1}}');
    expect(Object.keys(toExpressionVariables(own as Record<string, unknown>))).toEqual(['__proto__']);
  });

  it('works again after it was ended', async () => {
    const expression = compileExpression('variables.l.all(a, variables.l.all(b, variables.l.all(c, true)))', {
      pointer: '/e',
      faults: [],
    });
    const input = (length: number) => ({
      query: '',
      output: '',
      variables: { l: Array.from({ length }, () => 1) },
    });
    await expect(expression?.holds(input(2000), evaluations())).rejects.toThrow('500 ms');
    expect(await expression?.holds(input(2), evaluations())).toBe(true);
  });
});

import { describe, expect, it } from '@jest/globals';
import { AppError, type Fault } from '../../src/errors.js';
import { OutputMemory } from '../../src/engine/output-memory.js';
import { compileTemplate, type EarlierResults, type TemplateScope } from '../../src/engine/templates.js';
import { atOnce } from '../../src/engine/turns.js';
import { evaluations, openPool } from './engine-support.js';

const nothingEarlier: EarlierResults = { outputs: {}, errors: {} };

/** What a run gives to its templates, where nothing is said about it. */
function scopeOf(scope: Partial<TemplateScope> = {}, earlier = nothingEarlier): TemplateScope {
  return {
    query: 'q',
    variables: {},
    chat_history: [],
    earlier: () => earlier,
    evaluations: evaluations(),
    ...scope,
  };
}

async function render(
  source: string,
  scope: Partial<TemplateScope> = {},
  earlier = nothingEarlier,
): Promise<string> {
  const faults: Fault[] = [];
  const template = atOnce(compileTemplate(source, { pointer: '/t', faults }));
  if (template === undefined) throw new Error(faults[0]?.detail);
  return (await template.render(scopeOf(scope, earlier))).text;
}

function faultIn(source: string): string {
  const faults: Fault[] = [];
  expect(atOnce(compileTemplate(source, { pointer: '/t', faults }))).toBeUndefined();
  expect(faults).toEqual([{ pointer: '/t', detail: expect.stringMatching(/^the template is not valid: /) }]);
  return faults[0]?.detail ?? '';
}

async function renderError(source: string, scope?: Partial<TemplateScope>): Promise<AppError> {
  try {
    await render(source, scope);
  } catch (error) {
    if (error instanceof AppError) return error;
    throw error;
  }
  throw new Error(`"${source.slice(0, 100)}" was rendered`);
}

describe('a template', () => {
  it('reads the query, variables, history, outputs and errors', async () => {
    const text = await render(
      '{{ query }}|{{ variables.user.name | upcase }}|{% for m in chat_history %}{{ m.actor }}:{{ m.content }};{% endfor %}|{{ outputs.a }}|{{ outputs["a-b"] }}|{{ errors.c.code }} {{ errors.c.message }}',
      {
        query: 'Hi',
        variables: { user: { name: 'Ann' } },
        chat_history: [
          { actor: 'user', content: '1' },
          { actor: 'assistant', content: '2' },
        ],
      },
      { outputs: { a: 'A', 'a-b': 'AB' }, errors: { c: { code: 'model_error', message: 'gone' } } },
    );
    expect(text).toBe('Hi|ANN|user:1;assistant:2;|A|AB|model_error gone');
  });

  it('reads outputs of agents with unlucky names', async () => {
    const outputs = { hasOwnProperty: '1', toString: '2', valueOf: '3', toLiquid: '4', _1: '5' };
    expect(
      await render(
        '{{ outputs.hasOwnProperty }}{{ outputs.toString }}{{ outputs.valueOf }}{{ outputs.toLiquid }}{{ outputs._1 }}',
        {},
        { outputs, errors: {} },
      ),
    ).toBe('12345');
  });

  it('gives nothing for what is missing', async () => {
    expect(await render('[{{ variables.a.b }}{{ nope }}{{ outputs.x }}{{ errors.x.message }}]')).toBe('[]');
  });

  it('shows hostile text as it is', async () => {
    const hostile = '{{ query }} {% raw %}\r\n\u2028\u0000\ud800😀<script>';
    expect(await render('{{ query }}', { query: hostile })).toBe(hostile);
  });

  it('is refused when it can not be parsed, saying where', () => {
    expect(faultIn('line 1\n{{ query | nope }}')).toContain('undefined filter: nope, line:2');
    for (const source of [
      '{{',
      '{% if query %}',
      '{% foo %}',
      '{% if %}{% endif %}',
      '{{ query | }',
      '{% endfor %}',
    ])
      faultIn(source);
  });

  it('can not read files, and has no partials', () => {
    for (const tag of ['include', 'render', 'layout', 'block']) {
      expect(faultIn(`{% ${tag} "/etc/passwd" %}`)).toContain(`tag "${tag}" not found`);
    }
    expect(faultIn('{% liquid\n include "/etc/passwd"\n%}')).toContain('tag "include" not found');
  });

  it('sees neither prototypes nor anything of the server', async () => {
    for (const source of [
      '{{ query.constructor }}',
      '{{ variables.constructor.name }}',
      '{{ variables.__proto__ }}',
      '{{ variables["__proto__"]["constructor"] }}',
      '{{ outputs.toString }}',
      '{{ chat_history.map }}',
      '{{ process.env.PATH }}{{ globalThis }}{{ models }}{{ signal }}{{ agent_id }}',
    ]) {
      expect([source, await render(source)]).toEqual([source, '']);
    }
  });

  it('changes nothing that other renderings see', async () => {
    const variables = { n: 1 };
    const source =
      '{% assign __proto__ = variables %}{% assign variables = 5 %}{% increment query %}{% increment constructor %}';
    expect(await render(source, { variables })).toBe('00');
    expect(variables).toEqual({ n: 1 });
    expect(await render('{{ n }}{{ query }}{{ constructor }}')).toBe('q');
    expect(({} as Record<string, unknown>)['n']).toBeUndefined();
  });

  it('asks for earlier results only when it names them', async () => {
    const template = atOnce(compileTemplate('{{ query }}{{ query | upcase }}', { pointer: '', faults: [] }));
    const earlier = (): never => {
      throw new Error('asked');
    };
    expect(await template?.render({ ...scopeOf(), earlier })).toMatchObject({ text: 'qQ' });
  });

  it.each(['{{ query }}', '{{ query | upcase }}'])(
    'waits while its run holds much that is not said yet: %s',
    async (source) => {
      const own = evaluations();
      const letGo = await own.take(10_000_000);
      let text: string | undefined;
      const rendered = render(source, { evaluations: own, query: 'A' }).then((made) => (text = made));
      for (let turn = 0; turn < 100; turn++) await new Promise((resolve) => setImmediate(resolve));
      expect(text).toBeUndefined();
      letGo();
      await rendered;
      expect(text).toBe('A');
    },
  );

  it('of many agents that begin at once are made as long as the run holds little', async () => {
    const memory = new OutputMemory(Infinity, 1);
    const own = evaluations(undefined, memory.open());
    const query = 'a'.repeat(100_000);
    const source = '{{ query }}'.repeat(40);
    let made = 0;
    for (let agent = 0; agent < 10; agent++)
      void render(source, { evaluations: own, query }).then(() => made++);
    for (let turn = 0; turn < 100; turn++) await new Promise((resolve) => setImmediate(resolve));
    expect(made).toBe(3);
    expect(memory.held).toBe(3 * 4_000_000);
  });

  it('is made once more in a thread when all runs hold too much for it, and counts once', async () => {
    const memory = new OutputMemory(1000, 1);
    const [other, held] = [memory.open(), memory.open()];
    other.add(1_000_000);
    const { pool: threads, metrics } = openPool({ budget_ms: 1 });
    const own = evaluations(threads, held);
    const query = 'a'.repeat(100_000);
    let text: string | undefined;
    const rendered = render('{{ query | upcase }}', { evaluations: own, query }).then(
      (made) => (text = made),
    );
    const inThreads = async () =>
      (await metrics.evaluations.get()).values.find(({ labels }) => labels.place === 'thread')?.value;
    while ((await inThreads()) !== 1) await new Promise((resolve) => setTimeout(resolve, 5));
    await new Promise((resolve) => setTimeout(resolve, 20));
    expect([text, held.bytes]).toEqual([undefined, 0]);
    other.release();
    await rendered;
    expect(text).toBe(query.toUpperCase());
    expect(await inThreads()).toBe(2);
    expect(held.bytes).toBe(query.length);
  });

  it('is refused when it is too long or nested too deeply', async () => {
    expect(faultIn('x'.repeat(100_001))).toContain('longer than 100000 characters');
    expect(await render('x'.repeat(100_000))).toHaveLength(100_000);
    expect(faultIn('{% if a %}'.repeat(4500) + '{% endif %}'.repeat(4500))).toContain('nested too deeply');
  });

  it('is ended when it takes too long, too much memory, or gives too much text', async () => {
    const big = 'x'.repeat(100_000);
    const late = /longer than 500 ms|template render limit exceeded/;
    const memory = /memory|longer than 500 ms|longer than 5000000 characters/;
    const bombs: [string, RegExp][] = [
      ['{% for i in (1..3000) %}{% for j in (1..3000) %}{% assign x = i %}{% endfor %}{% endfor %}', late],
      [
        '{{ variables.long }}'.repeat(4000),
        /longer than 5000000 characters|longer than 500 ms|render limit exceeded/,
      ],
      ['{% for i in (1..100000000) %}x{% endfor %}', memory],
      ['{% assign x = "aaaaaaaa" %}{% for i in (1..60) %}{% assign x = x | append: x %}{% endfor %}', memory],
      [
        '{% for i in (1..100000) %}{{ variables.big }}{% endfor %}',
        /longer than 5000000 characters|longer than 500 ms/,
      ],
      [
        '{% for i in (1..60) %}{{ variables.big }}{% endfor %}',
        /longer than 5000000 characters|longer than 500 ms/,
      ],
      [
        '{% capture c %}{% for i in (1..4000) %}{{ variables.big }}{% endfor %}{% endcapture %}{{ c | split: "" | size }}',
        memory,
      ],
      ['{{ "now" | date: "%1000000000d" }}', memory],
    ];
    const long = Array.from({ length: 100_000 }, () => 1);
    for (const [source, message] of bombs) {
      const error = await renderError(source, { variables: { big, long } });
      expect(error.code).toBe('agent_error');
      expect(error.message).toMatch(message);
    }
  });

  it('is ended also within a single tag', async () => {
    const variables = { text: 'a'.repeat(20_000), part: 'a'.repeat(4000) + 'b' + 'a'.repeat(4000) };
    const many = Array.from({ length: 500 }, () => 'variables.text contains variables.part').join(' or ');
    expect((await renderError(`{% if ${many} %}{% endif %}`, { variables })).message).toContain(
      'longer than 500 ms',
    );
  });

  it('refuses searches that nothing could interrupt', async () => {
    const variables = { text: 'a'.repeat(400_000), part: 'a'.repeat(100_000) + 'b' + 'a'.repeat(100_000) };
    for (const search of [
      'variables.text | split: variables.part',
      'variables.text | replace: variables.part, ""',
      'variables.text | replace_first: variables.part, ""',
      'variables.text | replace_last: variables.part, ""',
      'variables.text | remove: variables.part',
      'variables.text | remove_first: variables.part',
      'variables.text | remove_last: variables.part',
    ]) {
      expect((await renderError(`{{ ${search} }}`, { variables })).message).toContain(
        'it searches a text of 400000 characters for one of 200001',
      );
    }
    expect(
      (await renderError('{% if variables.text contains variables.part %}{% endif %}', { variables }))
        .message,
    ).toContain('it searches a text');
    expect(await render('{{ query | replace: "a", "b" | split: "b" | join: "-" }}', { query: 'xay' })).toBe(
      'x-y',
    );
    expect(
      await render('{% if query contains "a" and variables.l contains 2 %}y{% endif %}', {
        query: 'xay',
        variables: { l: [1, 2] },
      }),
    ).toBe('y');
  });

  it('works again after it was ended', async () => {
    const template = atOnce(
      compileTemplate(
        '{% for i in variables.l %}{% for j in variables.l %}{% for k in variables.l %}{% cycle "a", "b" %}{% endfor %}{% endfor %}{% endfor %}',
        { pointer: '', faults: [] },
      ),
    );
    const scope = (length: number) => scopeOf({ variables: { l: Array.from({ length }, () => 1) } });
    await expect(template?.render(scope(2000))).rejects.toThrow(/500 ms|render limit/);
    expect(await template?.render(scope(2))).toMatchObject({ text: 'abababab' });
  });

  it('reads dates in UTC, wherever the server stands', async () => {
    expect(await render('{{ "2026-01-01T00:30:00Z" | date: "%Y-%m-%d %H:%M %z" }}')).toBe(
      '2026-01-01 00:30 +0000',
    );
  });
});

import { existsSync, readFileSync, readdirSync } from 'node:fs';
import { dirname, join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseEnv } from 'node:util';
import { describe, expect, it } from '@jest/globals';
import { loadConfig } from '../../src/config.js';
import { ERROR_CODES } from '../../src/errors.js';
import { Metrics } from '../../src/metrics.js';

const ROOT = fileURLToPath(new URL('../../', import.meta.url));
const read = (path: string) => readFileSync(join(ROOT, path), 'utf8');

const PAGES = ['.', 'docs', 'examples'].flatMap((folder) =>
  readdirSync(join(ROOT, folder))
    .filter((name) => name.endsWith('.md'))
    .map((name) => join(folder, name)),
);

/** The rows of a page's tables, each a list of its cells' Markdown. */
function rowsOf(page: string): string[][] {
  return read(page)
    .split('\n')
    .filter((line) => line.startsWith('|'))
    .map((line) => line.split(/(?<!\\)\|/).map((cell) => cell.trim()))
    .map((cells) => cells.slice(1, -1));
}

/** The rows of a page whose first cell is `name` set in code. */
const rowsAbout = (page: string, name: string) => rowsOf(page).filter(([first]) => first === `\`${name}\``);

/** First cells of a page's tables that are set in code and match `pattern`, which names what the page lists. */
const listed = (page: string, pattern: RegExp) =>
  rowsOf(page).flatMap(([first = '']) => /^`(.*)`$/.exec(first)?.[1]?.match(pattern)?.[0] ?? []);

describe('docs/errors.md', () => {
  it.each(Object.entries(ERROR_CODES))('leaves no client alone with the code %s', (code, { status }) => {
    const rows = rowsAbout('docs/errors.md', code);
    expect(rows.map((cells) => cells[1])).toEqual([String(status)]);
    // When it happens, and what to do about it.
    expect(rows[0]?.slice(2).filter((cell) => cell !== '')).toHaveLength(2);
  });

  it('promises no code that the server does not have', () => {
    const codes = listed('docs/errors.md', /^[a-z_]+$/);
    expect(codes.filter((code) => !(code in ERROR_CODES))).toEqual([]);
  });
});

describe('the configuration', () => {
  const defaults = Object.entries(loadConfig({})).filter(([, value]) => typeof value !== 'function');
  // Those without a default are not in there, so that the schema's own lines are asked.
  const variables = [...read('src/config.ts').matchAll(/^ {2}([A-Z][A-Z0-9_]+): /gm)].map(
    ([, name = '']) => name,
  );

  it('is found in its schema by these tests', () => {
    expect(variables).toEqual(expect.arrayContaining(defaults.map(([name]) => name)));
    expect(variables).toContain('DATABASE_URL');
  });

  it.each(variables)('has no secret variable: %s is in .env.example and in docs/operations.md', (name) => {
    expect(read('.env.example')).toMatch(new RegExp(`^(# )?${name}=`, 'm'));
    expect(rowsAbout('docs/operations.md', name)).toHaveLength(1);
  });

  it.each(defaults)('has the default in docs/operations.md that the server has: %s', (name, value) => {
    const text = typeof value === 'object' && !Array.isArray(value) ? JSON.stringify(value) : String(value);
    expect(rowsAbout('docs/operations.md', name)[0]?.[1]).toBe(`\`${text}\``);
  });

  it('is not changed by a copy of .env.example', () => {
    const { secret: _secret, ...config } = loadConfig({});
    expect(loadConfig(parseEnv(read('.env.example')))).toMatchObject(config);
  });

  it('has no variable in the documents that the server does not read', () => {
    const inTable = listed('docs/operations.md', /^[A-Z][A-Z0-9_]+$/);
    const inFile = [...read('.env.example').matchAll(/^(?:# )?([A-Z][A-Z0-9_]+)=/gm)].map(([, name]) => name);
    expect([...inTable, ...inFile].filter((name) => !variables.includes(String(name)))).toEqual([]);
  });
});

describe('the metrics', () => {
  const metrics = new Metrics().registry.getMetricsAsArray().map(({ name }) => name);

  it('are all in docs/operations.md, by their names or by the prefix of those that are not ours', () => {
    const missing = metrics.filter((name) => {
      const [, prefix] = /^(process_|nodejs_)/.exec(name) ?? [];
      if (prefix) return !read('docs/operations.md').includes(`\`${prefix}*\``);
      return rowsAbout('docs/operations.md', name).length !== 1;
    });
    expect(missing).toEqual([]);
  });

  it('that docs/operations.md names are measured', () => {
    const named = read('docs/operations.md').match(/\b(agent_studio|nodejs|process)_\w+_\w+/g) ?? [];
    expect(named.filter((name) => !metrics.includes(name))).toEqual([]);
  });
});

describe.each(PAGES)('%s', (page) => {
  // What is set in code is no link and no heading.
  const text = read(page).replaceAll(/^```[^]*?^```$/gm, '');
  const prose = text.replaceAll(/`[^`\n]*`/g, '');

  it('has no relative link that leads nowhere', () => {
    const targets = [...prose.matchAll(/\]\(([^)\s]+)\)/g)].map(([, target = '']) => target);
    const relativeOnes = targets.filter((target) => !/^[a-z]+:/.test(target));
    expect(relativeOnes.filter((target) => !leadsSomewhere(page, target))).toEqual([]);
  });

  it('names no npm script that does not exist', () => {
    const { scripts } = JSON.parse(read('package.json')) as { scripts: Record<string, string> };
    const named = [...read(page).matchAll(/npm (?:run (?:-s )?([\w:-]+)|(start|test)\b)/g)];
    const missing = named.filter(([, script, short]) => !(String(script ?? short) in scripts));
    expect(missing.map(([command]) => command)).toEqual([]);
  });
});

function leadsSomewhere(page: string, target: string): boolean {
  const [path = '', anchor] = target.split('#');
  const file = path === '' ? join(ROOT, page) : resolve(ROOT, dirname(page), path);
  if (!existsSync(file)) return false;
  return anchor === undefined || anchorsOf(relative(ROOT, file)).includes(anchor);
}

/** The anchors that GitHub gives to the headings of a page. */
function anchorsOf(page: string): string[] {
  const headings = read(page)
    .replaceAll(/^```[^]*?^```$/gm, '')
    .matchAll(/^#+ (.*)$/gm);
  return [...headings].map(([, heading = '']) =>
    heading
      .toLowerCase()
      .replaceAll(/[^\p{L}\p{N}\s_-]/gu, '')
      .replaceAll(/\s/g, '-'),
  );
}

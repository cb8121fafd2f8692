import { readFileSync, readdirSync } from 'node:fs';
import { basename, join } from 'node:path';
import { describe, expect, it } from '@jest/globals';

const TESTS = join(import.meta.dirname, '..');
/** What starts processes, and what of test/support does it for others. */
const STARTERS = [
  'node:child_process',
  'playwright-core',
  '/scripts/stack/stack.mjs',
  '/database/embedded-postgres.js',
];

const importsOf = (path: string) =>
  [...readFileSync(path, 'utf8').matchAll(/^(?:import|\} from) .*?'([^']+)';$/gm)].map(
    ([, from = '']) => from,
  );
const isStarter = (from: string) => STARTERS.some((starter) => from.includes(starter));

/** Names of the files of test/support that import a starter, or another one of these files. */
function startersOfSupport(): string[] {
  const folder = join(TESTS, 'support');
  const files = readdirSync(folder).filter((name) => name.endsWith('.ts'));
  const found = new Set<string>();
  for (let before = -1; before < found.size;) {
    before = found.size;
    for (const name of files) {
      const imports = importsOf(join(folder, name));
      if (imports.some((from) => isStarter(from) || found.has(basename(from, '.js'))))
        found.add(basename(name, '.ts'));
    }
  }
  return [...found];
}

describe.each(['unit', 'e2e'])('test/%s', (folder) => {
  it('starts no processes of its own, so that `npm test` stays short: what does is in test/processes', () => {
    const support = startersOfSupport();
    expect(support).toEqual(expect.arrayContaining(['studio-process', 'with-processes', 'nginx']));
    const specs = readdirSync(join(TESTS, folder)).filter((name) => name.endsWith('.spec.ts'));
    const starting = specs.filter((name) =>
      importsOf(join(TESTS, folder, name)).some(
        (from) => isStarter(from) || (from.includes('/support/') && support.includes(basename(from, '.js'))),
      ),
    );
    expect(starting).toEqual([]);
  });
});

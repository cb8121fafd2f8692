import { spawn } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

/**
 * `npm run test:all`: everything that must hold, with all effort. It goes on after a test has failed, and its last line is the sum
 * of all its tests: `N passed, N failed`.
 */
async function main() {
  const folder = await mkdtemp(join(tmpdir(), 'agent-studio-results-'));
  const sum = { passed: 0, failed: 0, inconclusive: 0 };
  try {
    if ((await run('check', [], { EFFORT: 'full' })) !== 0) sum.failed++;
    else for (const script of ['test:jest', 'test:chaos']) await runTests(script, folder, sum);
  } finally {
    await rm(folder, { recursive: true });
  }
  if (sum.inconclusive > 0) console.log(`${sum.inconclusive} inconclusive`);
  console.log(`${sum.passed} passed, ${sum.failed} failed`);
  process.exitCode = sum.failed > 0 || sum.passed === 0 ? 1 : 0;
}

async function runTests(script, folder, sum) {
  console.log(`== ${script}`);
  const results = join(folder, `${script.replace(':', '-')}.json`);
  const inconclusive = `${results}l`;
  const env = { EFFORT: 'full', INCONCLUSIVE_LOG: inconclusive };
  const code = await run(script, ['--json', `--outputFile=${results}`], env);
  // A run that wrote no results has not come to its tests.
  const told = existsSync(results)
    ? JSON.parse(readFileSync(results, 'utf8'))
    : { numRuntimeErrorTestSuites: 1 };
  const failed = (told.numFailedTests ?? 0) + (told.numRuntimeErrorTestSuites ?? 0);
  sum.passed += told.numPassedTests ?? 0;
  sum.failed += failed === 0 && code !== 0 ? 1 : failed;
  if (existsSync(inconclusive))
    sum.inconclusive += readFileSync(inconclusive, 'utf8').split('\n').filter(Boolean).length;
}

/** @returns its exit code */
function run(script, args, env) {
  const child = spawn('npm', ['run', script, '--', ...args], {
    stdio: ['ignore', 'inherit', 'inherit'],
    env: { ...process.env, ...env },
  });
  return new Promise((resolve, reject) => child.once('error', reject).once('exit', resolve));
}

await main();

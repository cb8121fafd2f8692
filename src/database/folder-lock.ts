import { readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { diagnosis } from './postgres-binaries.js';

const LOCK_NAME = /^app-(\d+)-([\w-]+)\.lock$/;
const ATTEMPTS = 3;
const MAX_BACKOFF_MS = 200;

/**
 * Reserves a folder for this process, on this machine, until it lets go or dies.
 *
 * A lock is a file named after its owner: process id and start time. The name belongs to one process only, so a
 * dead owner's file can be deleted without a race; a single lock file can't be taken over safely, as the second
 * of two starters would delete the fresh lock of the first. Each starter announces itself first and looks for
 * others afterwards: two can both step back, but never both go on.
 *
 * @param folder absolute path of an existing folder
 * @returns a function that gives the folder back
 * @throws Error naming the folder and the process that holds it
 */
export async function lockFolder(folder: string): Promise<() => Promise<void>> {
  const name = `app-${process.pid}-${await incarnation(process.pid)}.lock`;
  const file = join(folder, name);
  for (let attempt = 1; ; attempt++) {
    await announce(file, folder);
    const holder = await otherHolder(folder, name);
    if (holder === undefined) return () => rm(file, { force: true });
    await rm(file, { force: true });
    if (attempt === ATTEMPTS) throw inUse(folder, holder);
    // Two that started at the same moment both stepped back: unequal pauses let one of them through.
    await sleep(Math.random() * MAX_BACKOFF_MS);
  }
}

async function announce(file: string, folder: string): Promise<void> {
  try {
    await writeFile(file, 'This file is in use as long as the process in its name is running.\n', {
      flag: 'wx',
    });
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EEXIST') throw inUse(folder, process.pid);
    throw error;
  }
}

/** Looks for a living owner of another lock and sweeps the locks of dead ones. */
async function otherHolder(folder: string, own: string): Promise<number | undefined> {
  for (const name of await readdir(folder)) {
    const match = LOCK_NAME.exec(name);
    if (match === null || name === own) continue;
    const pid = Number(match[1]);
    if ((await incarnation(pid)) === match[2]) return pid;
    await rm(join(folder, name), { force: true });
  }
  return undefined;
}

/**
 * Tells one life of a process id from the next: start time (clock ticks since boot, field 22 of
 * proc_pid_stat(5)) and boot id, so that a lock from before a reboot is not taken for a living one.
 *
 * @returns undefined if no such process runs; '0' where the system has no /proc and only the id counts
 */
async function incarnation(pid: number): Promise<string | undefined> {
  try {
    const stat = await readFile(`/proc/${pid}/stat`, 'utf8');
    // The second field is the program's name and may itself contain blanks and brackets.
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
    const isDead = fields[0] === 'Z' || fields[0] === 'X';
    const boot = await readFile('/proc/sys/kernel/random/boot_id', 'utf8');
    return isDead ? undefined : `${fields[19]}-${boot.slice(0, 8)}`;
  } catch {
    // No such process, or no /proc at all (macOS, Windows): a signal 0 tells which.
    return isRunning(pid) ? '0' : undefined;
  }
}

function isRunning(pid: number): boolean {
  try {
    return process.kill(pid, 0);
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}

function inUse(folder: string, pid: number): Error {
  const holder = pid === process.pid ? `this process (pid ${pid}) already` : `another process (pid ${pid})`;
  return diagnosis(
    `The data folder ${folder} is in use by ${holder}. One embedded PostgreSQL serves one process.`,
    [
      `stop process ${pid}`,
      'set DATA_DIR to another folder for this one',
      'set DATABASE_URL to the same PostgreSQL server in both, if they are meant to share their data',
    ],
  );
}

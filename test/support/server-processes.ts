import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { join } from 'node:path';

/** Process ids of the PostgreSQL servers with data below a folder, without their child processes. */
export function serversBelow(folder: string): number[] {
  // A server and its children work in the data folder.
  const pids = processIds().filter((pid) => workingDirectory(pid)?.startsWith(`${folder}/`));
  return pids.filter((pid) => !pids.includes(processFields(pid)?.parent ?? 0));
}

/** Process id of the server that serves an app's data folder, or did so last. */
export function serverOf(dataDir: string): number {
  return Number.parseInt(readFileSync(join(dataDir, 'postgres/data/postmaster.pid'), 'utf8'), 10);
}

/** Kills the shell that would stop a server at the end of its app, so that the server is left over. */
export function killWatcher(server: number): void {
  const [watcher, ...others] = processIds().filter((pid) => {
    const fields = processFields(pid);
    return fields?.session === server && fields.name === 'sh';
  });
  if (watcher === undefined || others.length > 0) throw new Error(`Server ${server} has not one watcher`);
  process.kill(watcher, 'SIGKILL');
}

/** The first fields of proc_pid_stat(5); undefined if the process has ended. */
export function processFields(pid: number) {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    const [, parent, group, session] = stat
      .slice(stat.lastIndexOf(')') + 2)
      .split(' ')
      .map(Number);
    return { name: /\((.*)\)/.exec(stat)?.[1], parent, group, session };
  } catch {
    return undefined;
  }
}

function processIds(): number[] {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map(Number);
}

function workingDirectory(pid: number): string | undefined {
  try {
    return readlinkSync(`/proc/${pid}/cwd`);
  } catch {
    return undefined; // it has just ended, or belongs to somebody else
  }
}

import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { join } from 'node:path';

/** Process ids of the PostgreSQL servers with data below a folder, without their child processes. */
export function serversBelow(folder: string): number[] {
  // A server and its children work in the data folder.
  const pids = processesBelow(folder);
  return pids.filter((pid) => !pids.includes(processFields(pid)?.parent ?? 0));
}

/** Process ids of the programs that work in a folder below this one. */
export function processesBelow(folder: string): number[] {
  return processIds().filter((pid) => workingDirectory(pid)?.startsWith(`${folder}/`));
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
  return linkOf(`/proc/${pid}/cwd`);
}

function linkOf(path: string): string | undefined {
  try {
    return readlinkSync(path);
  } catch {
    return undefined; // it has just ended, or belongs to somebody else
  }
}

/** Which of some processes has the TCP connection between these two ports of 127.0.0.1, at its first end (Linux). */
export function ownerOfConnection(ports: [number, number], pids: number[]): number | undefined {
  const [local, remote] = ports.map((port) => `0100007F:${port.toString(16).toUpperCase().padStart(4, '0')}`);
  const lines = readFileSync('/proc/net/tcp', 'utf8').trim().split('\n').slice(1);
  // proc_net_tcp: fields 1 and 2 are the addresses, field 9 is the inode.
  const sockets = lines.map((line) => line.trim().split(/\s+/));
  const socket = sockets.find((fields) => fields[1] === local && fields[2] === remote);
  return pids.find((pid) => openFiles(pid).includes(`socket:[${socket?.[9]}]`));
}

function openFiles(pid: number): string[] {
  const folder = `/proc/${pid}/fd`;
  try {
    return readdirSync(folder).flatMap((file) => linkOf(join(folder, file)) ?? []);
  } catch {
    return []; // it has just ended
  }
}

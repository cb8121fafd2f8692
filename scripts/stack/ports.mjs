import { once } from 'node:events';
import { connect, createServer } from 'node:net';

/**
 * Below the ports that systems give to outgoing connections (32768 on Linux, 49152 elsewhere): one of those could be
 * taken by any client while its process is restarted.
 */
const FIRST = 20_000;
const COUNT = 10_000;

// Programs that start several systems at once look in different places.
let next = (process.pid * 97) % COUNT;

/** A port of 127.0.0.1 that is free, and that this process has not given out before. */
export async function freePort() {
  for (let tries = 0; tries < COUNT; tries++) {
    const port = FIRST + (next++ % COUNT);
    if (await isFree(port, '127.0.0.1')) return port;
  }
  throw new Error(`There is no free port from ${FIRST} to ${FIRST + COUNT - 1}.`);
}

/**
 * Whether a program could listen there. It listens for a moment itself, so it is not for a port that clients know: one of them
 * would be lost.
 *
 * @param {number} port
 * @param {string} host
 */
export async function isFree(port, host) {
  const probe = createServer().listen(port, host);
  try {
    await once(probe, 'listening');
  } catch (error) {
    if (error.code === 'EADDRINUSE') return false;
    throw error;
  }
  probe.close();
  await once(probe, 'close');
  return true;
}

/**
 * Whether a program listens there, also one that is stopped.
 *
 * @param {number} port
 * @param {string} host
 */
export async function isTaken(port, host) {
  const probe = connect(port, host);
  try {
    await once(probe, 'connect');
    return true;
  } catch (error) {
    if (error.code === 'ECONNREFUSED') return false;
    throw error;
  } finally {
    probe.destroy();
  }
}

import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, it } from '@jest/globals';
import { startEmbeddedPostgres } from '../../src/database/embedded-postgres.js';
import { query, until } from '../support/embedded-postgres-apps.js';
import { serverOf, serversBelow } from '../support/server-processes.js';

it('an embedded server that ends by itself is started again, at the same URL and with its data, and ends when asked', async () => {
  const dataDir = await mkdtemp(join(tmpdir(), 'agent-studio-'));
  const logged: string[] = [];
  const server = await startEmbeddedPostgres({ dataDir, log: (line) => logged.push(line) });
  try {
    await query(server.url, 'create table note as select 42 as answer');
    for (let kills = 1; kills <= 2; kills++) {
      const killed = serverOf(dataDir);
      process.kill(killed, 'SIGKILL');
      const ready = () => logged.filter((line) => line.includes('ready again')).length;
      await until('the server to be there again', () => ready() === kills);
      expect(serverOf(dataDir)).not.toBe(killed);
      expect(await query(server.url, 'select answer from note')).toBe(42);
    }
    process.kill(serverOf(dataDir), 'SIGKILL');
  } finally {
    await server.stop(); // while it is just being started, too
  }
  expect(serversBelow(dataDir)).toEqual([]);
  await rm(dataDir, { recursive: true });
});

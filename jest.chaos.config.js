import { spawnSync } from 'node:child_process';
import all, { server } from './jest.config.js';

/** The specs that depend on what carries the queue; the others run with it in PostgreSQL only. */
const OF_THE_QUEUE = ['accepted', 'crash', 'redis', 'zombie'];

const project = (queue, options) => ({
  ...server,
  displayName: `queue in ${queue}`,
  roots: ['<rootDir>/test/chaos'],
  globalSetup: '<rootDir>/test/support/chaos-setup.mjs',
  globalTeardown: undefined,
  globals: { CHAOS_QUEUE: queue },
  ...options,
});

// The server needs no Redis, so its developers may have none either, and can run the rest. The gate (`CI`) installs it.
const hasRedis = process.env.CI !== undefined || spawnSync('redis-server', ['--version']).status === 0;
if (!hasRedis)
  console.error('redis-server is not installed: the tests with the queue in Redis are left out.');

/** `npm run test:chaos`: whole systems of processes that are killed, stopped and cut off; `-- --selectProjects "queue in redis"`. */
export default {
  projects: [
    project('postgres', { testPathIgnorePatterns: ['/redis\\.spec\\.ts$'] }),
    ...(hasRedis ? [project('redis', { testMatch: [`**/(${OF_THE_QUEUE.join('|')}).spec.ts`] })] : []),
  ],
  testTimeout: all.testTimeout,
  reporters: all.reporters,
  // Each file starts a dozen processes; beside those of another one a living worker may miss its lease of a second.
  maxWorkers: 1,
  // What a failed test has left waiting must not keep the run from its end; the processes end with it.
  forceExit: true,
};

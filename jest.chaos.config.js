import base from './jest.config.js';

const { testEnvironment, extensionsToTreatAsEsm, moduleNameMapper, transform, reporters } = base;

/** The specs that depend on what carries the queue; the others run with it in PostgreSQL only. */
const OF_THE_QUEUE = ['accepted', 'clocks', 'crash', 'limits', 'poison', 'redis', 'zombie'];

const project = (queue, testMatch) => ({
  testEnvironment,
  extensionsToTreatAsEsm,
  moduleNameMapper,
  transform,
  testMatch,
  globalSetup: '<rootDir>/test/support/chaos-setup.mjs',
  displayName: `queue in ${queue}`,
  roots: ['<rootDir>/test/chaos'],
  globals: { CHAOS_QUEUE: queue },
});

/** `npm run test:chaos`: whole systems of processes that are killed, stopped and cut off; `-- --selectProjects "queue in redis"`. */
export default {
  projects: [
    { ...project('postgres', ['**/*.spec.ts']), testPathIgnorePatterns: ['/redis\\.spec\\.ts$'] },
    project('redis', [`**/(${OF_THE_QUEUE.join('|')}).spec.ts`]),
  ],
  reporters,
  // Each file starts a dozen processes.
  maxWorkers: 1,
  // What a failed test has left waiting must not keep the run from its end; the processes end with it.
  forceExit: true,
};

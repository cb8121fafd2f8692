/** Jest runs the TypeScript of the tests as ES modules: `node --experimental-vm-modules node_modules/jest/bin/jest.js`. */
const common = {
  extensionsToTreatAsEsm: ['.ts'],
  moduleNameMapper: { '^(\\.{1,2}/.*)\\.js$': '$1' },
  transform: {
    '^.+\\.ts$': [
      '@swc/jest',
      {
        swcrc: false,
        jsc: {
          parser: { syntax: 'typescript', decorators: true },
          transform: { legacyDecorator: true, decoratorMetadata: true, useDefineForClassFields: false },
          target: 'es2022',
          keepClassNames: true,
        },
        module: { type: 'es6' },
        sourceMaps: 'inline',
      },
    ],
  },
};

/** Tests of single parts: their sources are loaded into Jest's sandbox, where its clock can be turned. */
const unit = { ...common, displayName: 'unit', roots: ['<rootDir>/test/unit'] };

/** Tests of the whole server: the built one, which Node loads once for all files. */
export const server = {
  ...common,
  displayName: 'server',
  roots: ['<rootDir>/test/e2e', '<rootDir>/test/hostile', '<rootDir>/test/processes'],
  testEnvironment: '<rootDir>/test/support/server-environment.mjs',
  transform: {
    '/src/.*\\.ts$|/node_modules/typeorm/index\\.mjs$': '<rootDir>/test/support/built-transform.mjs',
    ...common.transform,
  },
  // The class of TypeORM's DataSource is what the server's own is asked for by.
  transformIgnorePatterns: ['/node_modules/(?!typeorm/index\\.mjs$)'],
  globalSetup: '<rootDir>/test/support/global-setup.mjs',
  globalTeardown: '<rootDir>/test/support/global-teardown.mjs',
};

/** All tests but those of test/chaos, which `npm run test:chaos` runs. */
export default {
  projects: [unit, server],
  testTimeout: 120_000,
  reporters: ['default', '<rootDir>/test/support/inconclusive-reporter.mjs'],
  maxWorkers: 2,
};

import base from './jest.config.js';

/** The tests of `npm test`: all but those that start processes of their own. */
export default {
  ...base,
  testPathIgnorePatterns: [...base.testPathIgnorePatterns, '<rootDir>/test/processes/'],
};

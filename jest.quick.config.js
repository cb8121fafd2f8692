import all, { server } from './jest.config.js';

const [unit] = all.projects;

/** The tests of `npm test`: all but those that start processes of their own. */
export default {
  ...all,
  projects: [unit, { ...server, testPathIgnorePatterns: ['<rootDir>/test/processes/'] }],
};

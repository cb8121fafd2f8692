import { ConfigError, loadConfig } from './src/config.js';
import { createDataSource } from './src/database/data-source.js';

const { DATABASE_URL } = loadConfig();
if (!DATABASE_URL)
  throw new ConfigError('Set DATABASE_URL to the database that the TypeORM CLI shall work on.');

/** The DataSource for the TypeORM CLI; `npm run migration:generate` shows how it is called. */
export default createDataSource({ url: DATABASE_URL });

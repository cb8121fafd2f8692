import type { NestExpressApplication } from '@nestjs/platform-express';
import { createApp } from '../../src/app.js';
import { loadConfig } from '../../src/config.js';
import { createMigratedDatabase } from './database.js';
import type { TestDatabase } from './database.js';

export interface TestApp {
  app: NestExpressApplication;
  /** `http://127.0.0.1:<port>` */
  url: string;
  database: TestDatabase;
  /** Closes the app; drops its database unless it was given. */
  close(): Promise<void>;
}

/** The real server on a free port, with a database of its own unless one is given. `env` are variables of its configuration. */
export async function startTestApp(env: Record<string, string> = {}, given?: TestDatabase): Promise<TestApp> {
  const database = given ?? (await createMigratedDatabase());
  const config = loadConfig({
    LOG_LEVEL: 'error',
    SHUTDOWN_GRACE_MS: '200',
    // A test machine may be too busy for a while to renew a lock; a process that shuts down gives its executions back.
    JOB_LOCK_MS: '60000',
    ...env,
    DATABASE_URL: database.url,
  });
  const app = await createApp({ ...config, DATABASE_URL: database.url });
  await app.listen(0, '127.0.0.1');
  return {
    app,
    url: await app.getUrl(),
    database,
    close: async () => {
      await app.close();
      if (!given) await database.drop();
    },
  };
}

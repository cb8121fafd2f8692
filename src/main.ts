import { resolve } from 'node:path';
import { Logger } from '@nestjs/common';
import { createApp } from './app.js';
import { ConfigError, loadConfig } from './config.js';
import { startEmbeddedPostgres } from './database/embedded-postgres.js';

/** How long the shutdown may take beyond the grace period, ms: a database that is away must not hold it for ever. */
const CLOSE_MS = 10_000;

/** Starts the server, with a PostgreSQL of its own where `DATABASE_URL` is not set, and drains both on SIGTERM or SIGINT. */
async function main(): Promise<void> {
  const config = loadConfig();
  const embedded = config.DATABASE_URL
    ? undefined
    : await startEmbeddedPostgres({
        dataDir: resolve(config.DATA_DIR),
        log: (message) => console.error(message),
      });
  const app = await createApp({
    ...config,
    DATABASE_URL: config.DATABASE_URL ?? embedded?.url ?? '',
    // A server that somebody only tries out has something to try.
    SEED_EXAMPLE: config.SEED_EXAMPLE ?? (embedded ? 'true' : 'false'),
  });
  const logger = new Logger('main');

  let closing: Promise<void> | undefined;
  const close = async (signal: string) => {
    setTimeout(() => {
      logger.error('closing took too long: what still runs is left to other workers');
      process.exit(1);
    }, config.SHUTDOWN_GRACE_MS + CLOSE_MS).unref();
    logger.log(`${signal}: finishing what runs (at most ${config.SHUTDOWN_GRACE_MS} ms), then closing`);
    await app.close();
    await embedded?.stop();
    logger.log('closed');
  };
  for (const signal of ['SIGTERM', 'SIGINT'] as const) {
    process.on(signal, () => {
      closing ??= close(signal).catch((error: unknown) => {
        logger.error(error);
        process.exitCode = 1;
      });
    });
  }

  await app.listen(config.PORT, config.HOST).catch(async (error: unknown) => {
    await app.close(); // hands back what its worker has taken already
    await embedded?.stop();
    throw error;
  });
  const url = await app.getUrl();
  logger.log(
    { url, docs: `${url}/api/docs`, role: config.ROLE, pid: process.pid },
    `Agent Studio listens on ${url}`,
  );
}

main().catch((error: unknown) => {
  // Said in words: whoever starts the server reads this, not a log.
  console.error(describeFailure(error));
  process.exit(1);
});

function describeFailure(error: unknown): unknown {
  if (error instanceof ConfigError) return error.message;
  if (!(error instanceof Error)) return error;
  if ('code' in error && error.code === 'EADDRINUSE') {
    return `${error.message}\nAnother program listens there: stop it, or set PORT (0 takes a free one).`;
  }
  return error.stack;
}

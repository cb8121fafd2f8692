import { rm } from 'node:fs/promises';

export default async function globalTeardown() {
  const { testPostgres } = globalThis;
  if (!testPostgres) return;
  await testPostgres.server.stop();
  await rm(testPostgres.dataDir, { recursive: true, force: true });
}

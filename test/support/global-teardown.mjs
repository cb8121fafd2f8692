import { rm } from 'node:fs/promises';

export default async function globalTeardown() {
  const { server, dataDir, dropTemplate } = globalThis.testPostgres ?? {};
  await dropTemplate?.();
  if (!server) return;
  await server.stop();
  await rm(dataDir, { recursive: true, force: true });
}

/**
 * An app for embedded-postgres.spec.ts: starts the server and keeps it until its stdin says `stop`.
 * Arguments: module to import, data folder. Prints one line of JSON for each thing that happens.
 */
import { createInterface } from 'node:readline';

const [module, dataDir] = process.argv.slice(2);
const say = (event) => process.stdout.write(`${JSON.stringify(event)}\n`);
const { startEmbeddedPostgres } = await import(module);

let server;
try {
  server = await startEmbeddedPostgres({ dataDir, log: (log) => say({ log }) });
} catch (error) {
  say({ error: error.message });
  process.exit(1);
}
say({ url: server.url });
for await (const line of createInterface({ input: process.stdin })) {
  if (line !== 'stop') continue;
  await server.stop();
  break;
}
// Without a call of process.exit(): the stopped server must not keep this process alive.
process.stdin.destroy();

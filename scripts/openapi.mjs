import { readFile, writeFile } from 'node:fs/promises';
import { NestFactory } from '@nestjs/core';
import { AppModule } from '../dist/app.module.js';
import { createAsyncApi } from '../dist/asyncapi.js';
import { createOpenApi } from '../dist/openapi.js';

/** Compares openapi.json and asyncapi.json with the built server's documents, or writes them with `--write`. No database is needed. */
const app = await NestFactory.create(AppModule.forRoot({}), { preview: true, logger: false });
const documents = { 'openapi.json': createOpenApi(app), 'asyncapi.json': createAsyncApi(app) };

for (const [name, document] of Object.entries(documents)) {
  const file = new URL(`../${name}`, import.meta.url);
  const generated = `${JSON.stringify(document, null, 2)}\n`;
  if (process.argv.includes('--write')) {
    await writeFile(file, generated);
  } else if (generated !== (await readFile(file, 'utf8').catch(() => ''))) {
    console.error(`${name} is not what the server answers: run \`npm run openapi\` and commit the change.`);
    process.exitCode = 1;
  }
}

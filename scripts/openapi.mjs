import { readFile, writeFile } from 'node:fs/promises';
import { NestFactory } from '@nestjs/core';
import { AppModule } from '../dist/app.module.js';
import { createOpenApi } from '../dist/openapi.js';

/** Compares openapi.json with the built server's document, or writes it with `--write`. No database is needed. */
const FILE = new URL('../openapi.json', import.meta.url);

const app = await NestFactory.create(AppModule.forRoot({}), { preview: true, logger: false });
const generated = `${JSON.stringify(createOpenApi(app), null, 2)}\n`;

if (process.argv.includes('--write')) {
  await writeFile(FILE, generated);
} else if (generated !== (await readFile(FILE, 'utf8').catch(() => ''))) {
  console.error('openapi.json is not what the server answers: run `npm run openapi` and commit the change.');
  process.exitCode = 1;
}

import type { INestApplication, Type } from '@nestjs/common';
import { DocumentBuilder, SwaggerModule } from '@nestjs/swagger';
import type { OpenAPIObject } from '@nestjs/swagger';

/** The OpenAPI 3.1 document of the whole API; with the schemas of `extraModels`, which no route needs. */
export function createOpenApi(app: INestApplication, extraModels: Type<object>[] = []): OpenAPIObject {
  const description =
    'Deploy workflows of AI agents and stream their executions. Every chunk is committed to a log before it is sent, so ' +
    'a stream can be resumed at any chunk, from any process.';
  const base = new DocumentBuilder()
    .setTitle('Agent Studio')
    .setDescription(description)
    .setVersion('1')
    .setOpenAPIVersion('3.1.0')
    .setLicense('MIT', 'https://spdx.org/licenses/MIT.html')
    .addServer('/')
    .build();
  return SwaggerModule.createDocument(app, base, { extraModels });
}

/** Serves Swagger UI at `/api/docs` and the document at `/api/openapi.json`. */
export function serveOpenApi(app: INestApplication): void {
  SwaggerModule.setup('api/docs', app, () => createOpenApi(app), {
    jsonDocumentUrl: 'api/openapi.json',
    customSiteTitle: 'Agent Studio API',
    swaggerOptions: { displayRequestDuration: true },
  });
}

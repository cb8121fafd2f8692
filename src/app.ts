import { NestFactory } from '@nestjs/core';
import type { NestExpressApplication } from '@nestjs/platform-express';
import type { RequestHandler } from 'express';
import helmet from 'helmet';
import { serveAsyncApi } from './asyncapi.js';
import { AppModule } from './app.module.js';
import type { ServerConfig } from './config.js';
import { requireOneHost } from './connection-limits.js';
import { DrainingAdapter } from './draining.adapter.js';
import { useJsonBody } from './json-body.js';
import { AppError } from './errors.js';
import { JsonLogger, requestLog } from './json-logger.js';
import { Metrics } from './metrics.js';
import { serveOpenApi } from './openapi.js';
import { RequestPipe } from './request.pipe.js';
import { ProblemFilter } from './problem.filter.js';
import { StudioWsAdapter } from './websocket/websocket.adapter.js';

/** A worker listens for probes and scrapes only: nobody should come to depend on it for anything else. */
const refuse: RequestHandler = (_request, _response, next) => {
  next(
    new AppError(
      'not_found',
      'This process only runs executions (ROLE=worker). Ask one with ROLE=api or all.',
    ),
  );
};

/** Builds the server, connected to its database and ready to `listen`; `close` drains it. */
export async function createApp(config: ServerConfig): Promise<NestExpressApplication> {
  const logger = new JsonLogger(config.LOG_LEVEL);
  const app = await NestFactory.create<NestExpressApplication>(
    AppModule.forRoot(config),
    new DrainingAdapter(config),
    {
      logger,
      bodyParser: false,
      abortOnError: false,
    },
  );
  app.disable('x-powered-by');
  app.use(requestLog(logger.pino));
  app.use(requireOneHost);
  app.use(
    helmet({
      // Most installations are reached by plain http on a private address, where an upgrade would lead nowhere.
      contentSecurityPolicy: { directives: { upgradeInsecureRequests: null } },
      strictTransportSecurity: false,
      crossOriginResourcePolicy: { policy: 'cross-origin' },
    }),
  );
  app.enableCors({
    origin: config.CORS_ORIGINS.includes('*') ? '*' : config.CORS_ORIGINS,
    methods: ['GET', 'POST', 'PUT', 'DELETE'],
    allowedHeaders: [
      'Content-Type',
      'Accept',
      'Cache-Control',
      'Last-Event-ID',
      'Idempotency-Key',
      'X-Request-Id',
    ],
    exposedHeaders: ['Location', 'Content-Location', 'X-Request-Id', 'Retry-After'],
    maxAge: 600,
  });
  if (config.ROLE === 'worker') app.use('/api', refuse);
  useJsonBody(app, config);
  app.useGlobalPipes(new RequestPipe());
  const { droppedConnections } = app.get(Metrics);
  app.getHttpServer().on('drop', () => droppedConnections.inc());
  app.useGlobalFilters(new ProblemFilter());
  app.useWebSocketAdapter(new StudioWsAdapter(app));
  serveOpenApi(app);
  serveAsyncApi(app);
  await app.init();
  return app;
}

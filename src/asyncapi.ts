import type { INestApplication } from '@nestjs/common';
import type { Response } from 'express';
import { createOpenApi } from './openapi.js';
import { ANSWERS, REQUESTS } from './websocket/message-descriptions.js';
import type { MessageDescription } from './websocket/message-descriptions.js';
import { WEBSOCKET_PATH } from './websocket/websocket.dto.js';

type Json = Record<string, unknown>;

const ID = {
  description: "The caller's name for its message; whatever that causes comes with it",
  oneOf: [{ type: 'string', maxLength: 200 }, { type: 'number' }],
};
const AFTER = {
  description: 'Position of this item of the stream: pass it as `after` of `subscribe` to go on behind it',
  type: 'integer',
};

/** The AsyncAPI 3.0 document of the WebSocket; its payloads are the schemas of the OpenAPI document. */
export function createAsyncApi(app: INestApplication): Json {
  const all = { ...REQUESTS, ...ANSWERS };
  const models = Object.values(all).flatMap(({ data }) => data);
  const { components } = createOpenApi(app, models);
  const schemas = (components?.schemas ?? {}) as Json;
  const names = models.map(({ name }) => name);
  const refsTo = (events: object) =>
    Object.keys(events).map((event) => ({ $ref: `#/channels/studio/messages/${event}` }));
  return {
    asyncapi: '3.0.0',
    info: {
      title: 'Agent Studio',
      version: '1',
      description:
        'Run, follow and cancel executions over one WebSocket. Each message is a JSON object in a text frame. Streams can be resumed behind any item, at any process.',
      license: { name: 'MIT', url: 'https://spdx.org/licenses/MIT.html' },
    },
    defaultContentType: 'application/json',
    channels: {
      studio: {
        address: WEBSOCKET_PATH,
        description: 'Everything goes over one channel.',
        messages: Object.fromEntries(
          Object.keys(all).map((event) => [event, { $ref: `#/components/messages/${event}` }]),
        ),
      },
    },
    operations: {
      receive: {
        action: 'receive',
        channel: { $ref: '#/channels/studio' },
        summary: 'What clients send',
        messages: refsTo(REQUESTS),
      },
      send: {
        action: 'send',
        channel: { $ref: '#/channels/studio' },
        summary: 'What the server sends',
        messages: refsTo(ANSWERS),
      },
    },
    components: {
      messages: Object.fromEntries(
        Object.entries(all).map(([event, description]) => [event, messageOf(event, description)]),
      ),
      schemas: reachable(schemas, names),
    },
  };
}

/** Serves the document at `/api/asyncapi.json`. */
export function serveAsyncApi(app: INestApplication): void {
  let document: Json | undefined;
  app.getHttpAdapter().get('/api/asyncapi.json', (_request: unknown, response: Response) => {
    response.json((document ??= createAsyncApi(app)));
  });
}

function messageOf(event: string, { summary, data, oneOf, hasPosition = false }: MessageDescription): Json {
  const refs = data.map(({ name }) => ({ $ref: `#/components/schemas/${name}` }));
  const oneMember = oneOf ? [{ oneOf: oneOf.map((name) => ({ required: [name] })) }] : [];
  const isRequest = event in REQUESTS;
  const mayBeEmpty = event === 'ping';
  return {
    name: event,
    summary,
    payload: {
      type: 'object',
      required: ['event', ...(mayBeEmpty ? [] : ['data']), ...(hasPosition ? ['after'] : [])],
      properties: {
        event: { const: event },
        id: ID,
        ...(hasPosition ? { after: AFTER } : {}),
        data: refs.length > 1 ? { oneOf: refs } : { allOf: [...refs, ...oneMember] },
      },
      ...(isRequest ? { additionalProperties: false } : {}),
    },
  };
}

/** The schemas with these names, and all that they refer to. */
function reachable(schemas: Json, names: string[]): Json {
  const found: Json = {};
  const open = [...names];
  for (let name = open.pop(); name !== undefined; name = open.pop()) {
    if (name in found) continue;
    found[name] = schemas[name];
    const refs = JSON.stringify(schemas[name]).matchAll(/"#\/components\/schemas\/(\w+)"/g);
    open.push(...[...refs].map(([, referred = '']) => referred));
  }
  return Object.fromEntries(Object.entries(found).toSorted(([one], [other]) => (one < other ? -1 : 1)));
}

import { readFileSync } from 'node:fs';

/** As much of JSON Schema as the documents of the interface use. */
export interface Schema {
  $ref?: string;
  type?: string;
  format?: string;
  enum?: unknown[];
  example?: unknown;
  default?: unknown;
  minimum?: number;
  properties?: Record<string, Schema>;
  required?: string[];
  items?: Schema;
  allOf?: Schema[];
}

/** A route and what it takes. */
export interface Operation {
  method: string;
  /** With its parameters in braces. */
  path: string;
  query: string[];
  headers: string[];
  body?: Schema;
}

interface Document {
  paths: Record<
    string,
    Record<
      string,
      {
        parameters?: { in: string; name: string }[];
        requestBody?: { content: Record<string, { schema: Schema }> };
      }
    >
  >;
  components: { schemas: Record<string, Schema> };
}

const read = (name: string) => readFileSync(new URL(`../../${name}`, import.meta.url), 'utf8');
const openApi = JSON.parse(read('openapi.json')) as Document;
const asyncApi = JSON.parse(read('asyncapi.json')) as {
  operations: { receive: { messages: { $ref: string }[] } };
  components: {
    schemas: Record<string, Schema>;
    messages: Record<string, { payload: Schema & { properties: Record<string, Schema> } }>;
  };
};

/** All routes of `openapi.json`. */
export const OPERATIONS: Operation[] = Object.entries(openApi.paths).flatMap(([path, methods]) =>
  Object.entries(methods).map(([method, { parameters = [], requestBody }]) => ({
    method: method.toUpperCase(),
    path,
    query: parameters.filter((parameter) => parameter.in === 'query').map(({ name }) => name),
    headers: parameters.filter((parameter) => parameter.in === 'header').map(({ name }) => name),
    body: requestBody?.content['application/json']?.schema,
  })),
);

/** What clients may send over the WebSocket: the event, and the schema of its `data`. */
export const MESSAGES: { event: string; data: Schema }[] = asyncApi.operations.receive.messages.map(
  ({ $ref }) => {
    const event = $ref.split('/').at(-1) ?? '';
    return { event, data: asyncApi.components.messages[event]?.payload.properties['data'] ?? {} };
  },
);

/** A schema with its reference, if it is one, resolved; that of several, the first. */
export function resolve(schema: Schema): Schema {
  const { $ref, allOf } = schema;
  if (allOf?.[0]) return resolve(allOf[0]);
  if ($ref === undefined) return schema;
  const name = $ref.split('/').at(-1) ?? '';
  return openApi.components.schemas[name] ?? asyncApi.components.schemas[name] ?? {};
}

/** A list or a text somewhere in a body, by the way that leads there; `0` is the element of a list. */
export interface Place {
  kind: 'list' | 'text' | 'object';
  way: string[];
}

/** All lists, texts and free-form objects below a schema. */
export function placesIn(schema: Schema, way: string[] = []): Place[] {
  const { type, properties, items } = resolve(schema);
  if (type === 'string') return [{ kind: 'text', way }];
  if (type === 'array' || items) return [{ kind: 'list', way }, ...placesIn(items ?? {}, [...way, '0'])];
  if (!properties) return type === 'object' ? [{ kind: 'object', way }] : [];
  return Object.entries(properties).flatMap(([name, property]) => placesIn(property, [...way, name]));
}

/** A body that fits its schema as far as the schema says; `known` gives the values of properties by their names. */
export function sample(schema: Schema, known: Record<string, unknown> = {}): unknown {
  const { type, properties, required = [], items, example, ...rest } = resolve(schema);
  if (properties) {
    const names = Object.keys(properties).filter((name) => required.includes(name) || name in known);
    return Object.fromEntries(
      names.map((name) => [name, name in known ? known[name] : sample(properties[name] ?? {}, known)]),
    );
  }
  if (example !== undefined) return example;
  if (rest.enum) return rest.enum[0];
  if (items) return [sample(items, known)];
  if (type === 'integer' || type === 'number') return rest.minimum ?? 1;
  if (type === 'boolean') return true;
  if (type === 'object') return {};
  return 'x';
}

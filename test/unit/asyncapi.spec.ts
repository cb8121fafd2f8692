import { readFileSync } from 'node:fs';
import { describe, expect, it } from '@jest/globals';
import { ANSWER_EVENTS, REQUEST_EVENTS } from '../../src/websocket/websocket.dto.js';
import { StudioGateway } from '../../src/websocket/studio.gateway.js';
import { itInFull } from '../support/effort.js';

const text = readFileSync(new URL('../../asyncapi.json', import.meta.url), 'utf8');

interface Document {
  channels: { studio: { address: string; messages: Record<string, unknown> } };
  operations: Record<'receive' | 'send', { messages: { $ref: string }[] }>;
}

const { channels, operations } = JSON.parse(text) as Document;
const eventsOf = (operation: 'receive' | 'send') =>
  operations[operation].messages.map(({ $ref }) => $ref.split('/').at(-1));

describe('asyncapi.json', () => {
  itInFull('has no fault that the tools of AsyncAPI find', async () => {
    // It takes seconds to be loaded.
    const { Parser } = await import('@asyncapi/parser');
    const { document, diagnostics } = await new Parser().parse(text);
    const faults = diagnostics.filter(({ severity }) => severity < 2);
    expect(faults.map(({ path, message }) => `${path.join('/')}: ${message}`)).toEqual([]);
    expect(document?.version()).toBe('3.0.0');
  });

  it('has the messages that the gateway takes, and no others', () => {
    const handled = Object.getOwnPropertyNames(StudioGateway.prototype).flatMap((name) => {
      const method = (StudioGateway.prototype as unknown as Record<string, object>)[name];
      return (Reflect.getMetadata('message', method ?? {}) as string | undefined) ?? [];
    });
    expect(handled.toSorted()).toEqual([...REQUEST_EVENTS].toSorted());
    expect(eventsOf('receive')).toEqual([...REQUEST_EVENTS]);
    expect(eventsOf('send')).toEqual([...ANSWER_EVENTS]);
    expect(Object.keys(channels.studio.messages)).toEqual([...REQUEST_EVENTS, ...ANSWER_EVENTS]);
    expect(channels.studio.address).toBe('/api/ws');
  });
});

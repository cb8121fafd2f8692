import { EventEmitter } from 'node:events';
import type { Socket } from 'node:net';
import { describe, expect, it, jest } from '@jest/globals';
import type { WebSocket } from 'ws';
import { SocketOutput } from '../../src/websocket/socket-output.js';
import { Subscription } from '../../src/websocket/subscription.js';
import type { StreamSource } from '../../src/websocket/subscription.js';
import { until } from '../support/studio.js';

/** A socket that is full as long as it is told to be, and takes what is sent otherwise. */
class Pipe extends EventEmitter {
  writableNeedDrain = false;
  readonly sent: string[] = [];
  cork(): void {}
  uncork(): void {}

  output(): SocketOutput {
    const webSocket = { send: (frame: string) => this.sent.push(frame), readyState: 1, OPEN: 1 };
    return new SocketOutput(webSocket as unknown as WebSocket, this as unknown as Socket, () => {});
  }
}

function sourceOf(executionId: string): StreamSource & { reads: number } {
  const source = {
    event: 'chunk' as const,
    name: { execution_id: executionId },
    intervalMs: 0,
    reads: 0,
    isOver: () => Promise.resolve(false),
    async *read(after = 0) {
      source.reads++;
      for (let first = after + 1; first <= 3; first++) {
        yield { first, chunks: [JSON.stringify(`${executionId} ${first}`)], terminal: first === 3 };
      }
    },
  };
  return source;
}

describe('a stream that is ended at the very moment of its turn', () => {
  it('keeps no other stream of the socket waiting', async () => {
    const pipe = new Pipe();
    const output = pipe.output();
    const turns = jest.spyOn(output, 'turn');
    const begin = (executionId: string) => {
      const source = sourceOf(executionId);
      const options = { source, id: executionId, after: undefined, output, onEnd: () => {} };
      const subscription = new Subscription(options);
      return { source, subscription, over: subscription.run() };
    };
    pipe.writableNeedDrain = true;
    const one = begin('one');
    // It has put down what it read, and waits with empty hands.
    await until(() => turns.mock.calls.some(([, held]) => held === undefined));
    pipe.writableNeedDrain = false;
    pipe.emit('drain');
    one.subscription.cancel();
    await one.over;
    await begin('two').over;
    expect(pipe.sent.map((frame) => (JSON.parse(frame) as { event: string }).event)).toEqual([
      'chunk',
      'chunk',
      'chunk',
      'end',
    ]);
  });
});

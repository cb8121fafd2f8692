import { Catch } from '@nestjs/common';
import type { ArgumentsHost, ExceptionFilter } from '@nestjs/common';
import { translate } from '../problem.filter.js';
import type { ClientConnection } from './client-connection.js';
import { withinData } from './message.js';
import type { ClientMessage } from './websocket.dto.js';

/** Answers what a handler throws with an `error` that has the `id` of its message. */
@Catch()
export class MessageProblemFilter implements ExceptionFilter {
  catch(thrown: unknown, host: ArgumentsHost): void {
    const context = host.switchToWs();
    const { id } = context.getData<ClientMessage>();
    context.getClient<ClientConnection>().fail(withinData(translate(thrown)), id);
  }
}

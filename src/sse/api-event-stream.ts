import { applyDecorators } from '@nestjs/common';
import { ApiHeader, ApiOkResponse, ApiProduces } from '@nestjs/swagger';

/** Describes a route that answers with Server-Sent Events and can be resumed. */
export function ApiEventStream(description: string): MethodDecorator {
  return applyDecorators(
    ApiHeader({
      name: 'Last-Event-ID',
      required: false,
      description: 'The id of the last event that the client has; the stream goes on after it',
    }),
    ApiProduces('text/event-stream'),
    ApiOkResponse({ description, schema: { type: 'string' } }),
  );
}

import { UseFilters } from '@nestjs/common';
import { ConnectedSocket, MessageBody, SubscribeMessage, WebSocketGateway } from '@nestjs/websockets';
import { BatchesService } from '../batches/batches.service.js';
import { AppError } from '../errors.js';
import { ExecutionsAcceptance } from '../executions/executions.acceptance.js';
import { ExecutionAcceptedDto } from '../executions/executions.dto.js';
import { ExecutionsService } from '../executions/executions.service.js';
import { Subscribers } from '../executions/subscribers.js';
import type { ClientConnection } from './client-connection.js';
import { StreamSources } from './stream-sources.js';
import type { OpenedSource } from './stream-sources.js';
import {
  CancelDto,
  ExecuteMessageDto,
  PingDto,
  SubscribeDto,
  UnsubscribeDto,
  WEBSOCKET_PATH,
} from './websocket.dto.js';
import type { MessageId, StreamTargetDto } from './websocket.dto.js';
import { MessageProblemFilter } from './websocket.filter.js';

/** Runs, follows and cancels executions for the clients of the WebSocket. */
@WebSocketGateway({ path: WEBSOCKET_PATH })
@UseFilters(MessageProblemFilter)
export class StudioGateway {
  constructor(
    private readonly acceptance: ExecutionsAcceptance,
    private readonly executions: ExecutionsService,
    private readonly batches: BatchesService,
    private readonly sources: StreamSources,
    private readonly subscribers: Subscribers,
  ) {}

  /** Runs a deployment and streams its answer. With the key of an earlier message it attaches to that one's execution. */
  @SubscribeMessage('execute')
  async execute(
    @ConnectedSocket() client: ClientConnection,
    @MessageBody('data') { idempotency_key, ...request }: ExecuteMessageDto,
    @MessageBody('id') id?: MessageId,
  ): Promise<void> {
    const giveBack = client.reserve();
    try {
      const accepted = await this.acceptance.accept(request, idempotency_key);
      const { execution_id } = accepted;
      const opened =
        accepted.status === 'queued'
          ? { source: this.sources.execution(execution_id), after: 0, ended: false }
          : await this.sources.openExecution(execution_id, 0);
      client.answer(id, 'accepted', ExecutionAcceptedDto.from(accepted));
      this.follow(client, { id, opened });
    } finally {
      giveBack();
    }
  }

  /** Sends a stream from where the client has it. */
  @SubscribeMessage('subscribe')
  async subscribe(
    @ConnectedSocket() client: ClientConnection,
    @MessageBody('data') wanted: SubscribeDto,
    @MessageBody('id') id?: MessageId,
  ): Promise<void> {
    const target = targetOf(wanted);
    if (wanted.status && !target.deployment_name) refuse('/status', 'goes with deployment_name only');
    const giveBack = client.reserve();
    try {
      const opened = await this.open(target, wanted);
      client.refuseSecond(opened.source.name);
      client.answer(id, 'subscribed', { ...opened.source.name, after: opened.after });
      this.follow(client, { id, opened });
    } finally {
      giveBack();
    }
  }

  /**
   * Ends a stream; of a deployment whose environment is not named, those of all environments. One that is not followed, as it
   * has just come to its end, is no error.
   */
  @SubscribeMessage('unsubscribe')
  unsubscribe(
    @ConnectedSocket() client: ClientConnection,
    @MessageBody('data') wanted: UnsubscribeDto,
    @MessageBody('id') id?: MessageId,
  ): void {
    const target = targetOf(wanted);
    client.unsubscribe(target);
    client.answer(id, 'unsubscribed', target);
  }

  /** Cancels an execution or a batch, whoever started it. */
  @SubscribeMessage('cancel')
  async cancel(
    @ConnectedSocket() client: ClientConnection,
    @MessageBody('data') { execution_id, batch_id }: CancelDto,
    @MessageBody('id') id?: MessageId,
  ): Promise<void> {
    refuseAllButOne({ execution_id, batch_id });
    const cancelled =
      execution_id === undefined
        ? await this.batches.cancel(batch_id ?? '')
        : await this.executions.cancel(execution_id);
    client.answer(id, 'cancelled', cancelled);
  }

  @SubscribeMessage('ping')
  ping(
    @ConnectedSocket() client: ClientConnection,
    @MessageBody('data') _data: PingDto,
    @MessageBody('id') id?: MessageId,
  ): void {
    client.answer(id, 'pong', {});
  }

  private open(
    { execution_id, batch_id, deployment_name }: StreamTargetDto,
    wanted: SubscribeDto,
  ): Promise<OpenedSource> {
    if (execution_id !== undefined) return this.sources.openExecution(execution_id, wanted.after);
    if (batch_id !== undefined) return this.sources.openBatch(batch_id, wanted.after);
    return this.sources.openDeployment(deployment_name ?? '', wanted);
  }

  private follow(
    client: ClientConnection,
    { id, opened }: { id: MessageId | undefined; opened: OpenedSource },
  ): void {
    const { execution_id } = opened.source.name;
    const leave = execution_id === undefined ? undefined : this.subscribers.follow(execution_id);
    client.follow({ id, leave, ...opened });
  }
}

/** The one stream that a message names, as answers name it. Throws `validation_failed` if it names none, or several. */
function targetOf({
  execution_id,
  batch_id,
  deployment_name,
  environment,
}: StreamTargetDto): StreamTargetDto {
  refuseAllButOne({ execution_id, batch_id, deployment_name });
  if (deployment_name !== undefined) return { deployment_name, environment };
  if (environment !== undefined) refuse('/environment', 'goes with deployment_name only');
  // As the log names it, whatever case a client writes it in.
  return execution_id === undefined
    ? { batch_id: batch_id?.toLowerCase() }
    : { execution_id: execution_id.toLowerCase() };
}

function refuseAllButOne(names: Record<string, string | undefined>): void {
  const given = Object.values(names).filter((name) => name !== undefined).length;
  if (given !== 1) refuse('', `must have one of ${Object.keys(names).join(', ')}`);
}

function refuse(pointer: string, detail: string): never {
  throw new AppError(
    'validation_failed',
    `The request is not valid: ${pointer} ${detail}.`.replace('  ', ' '),
    {
      faults: [{ pointer, detail }],
    },
  );
}

import type { Type } from '@nestjs/common';
import { BatchDto } from '../batches/batches.dto.js';
import { ExecutionAcceptedDto, ExecutionDto } from '../executions/executions.dto.js';
import {
  CancelDto,
  ChunkDto,
  ExecuteMessageDto,
  MessageProblemDto,
  PingDto,
  PongDto,
  StatusChangeDto,
  StatusSnapshotDto,
  StreamNameDto,
  SubscribeDto,
  SubscribedDto,
  UnsubscribeDto,
} from './websocket.dto.js';
import type { AnswerEvent, RequestEvent } from './websocket.dto.js';

/** A message for the document of the interface: what it is for, and what its `data` may be. */
export interface MessageDescription {
  summary: string;
  data: Type<object>[];
  /** Members of `data` of which there is exactly one. */
  oneOf?: string[];
  /** The message always has an `after`. */
  hasPosition?: boolean;
}

/** What clients send. */
export const REQUESTS: Record<RequestEvent, MessageDescription> = {
  execute: { summary: 'Run a deployment and stream its answer', data: [ExecuteMessageDto] },
  subscribe: {
    summary: 'Follow an execution, a batch or the status of a deployment, from any position',
    data: [SubscribeDto],
    oneOf: ['execution_id', 'batch_id', 'deployment_name'],
  },
  unsubscribe: {
    summary: 'Follow it no longer; it goes on',
    data: [UnsubscribeDto],
    oneOf: ['execution_id', 'batch_id', 'deployment_name'],
  },
  cancel: {
    summary: 'Cancel an execution or a batch',
    data: [CancelDto],
    oneOf: ['execution_id', 'batch_id'],
  },
  ping: { summary: 'Ask for an answer', data: [PingDto] },
};

/** What the server sends. */
export const ANSWERS: Record<AnswerEvent, MessageDescription> = {
  accepted: { summary: 'The execution is accepted; its chunks follow', data: [ExecutionAcceptedDto] },
  subscribed: { summary: 'The stream is followed; its frames come after this', data: [SubscribedDto] },
  unsubscribed: { summary: 'No frame of the stream comes after this', data: [StreamNameDto] },
  cancelled: {
    summary: 'The cancellation is certain; `status` says whether the end has come',
    data: [ExecutionDto, BatchDto],
  },
  pong: { summary: 'The answer to a ping', data: [PongDto] },
  chunk: { summary: 'A chunk of an execution or of a batch', data: [ChunkDto], hasPosition: true },
  status: {
    summary: 'The status of a deployment and of its executions: a snapshot, then each change',
    data: [StatusSnapshotDto, StatusChangeDto],
    hasPosition: true,
  },
  end: { summary: 'Nothing of the stream is left', data: [StreamNameDto] },
  error: { summary: 'What was asked for is refused, or a stream can not go on', data: [MessageProblemDto] },
};

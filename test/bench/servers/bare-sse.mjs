// The floor: frames that were made before, written to the socket. No model, no database.
import { randomUUID } from 'node:crypto';
import { createServer } from 'node:http';
import { announce } from '../child.mjs';
import { CHUNKS, SSE_HEADERS, frame, pace, readModel, readModelName, token } from '../streams.mjs';

const executionId = randomUUID();
const started = frame(executionId, 1, { type: 'status', status: 'started' });
const contents = Array.from({ length: CHUNKS }, (_, index) =>
  frame(executionId, index + 2, { type: 'content', data: token(index) }),
);
const completed = frame(executionId, CHUNKS + 2, { type: 'status', status: 'completed' });

announce(
  createServer(async (request, response) => {
    const { delay } = readModelName(await readModel(request));
    response.writeHead(200, SSE_HEADERS);
    response.write(started);
    if (delay === 0) {
      for (const content of contents) response.write(content);
      response.end(completed);
      return;
    }
    pace(
      { count: CHUNKS, delay },
      {
        write: (index) => response.write(contents[index]),
        end: () => response.end(completed),
        isOver: () => response.destroyed,
      },
    );
  }),
);

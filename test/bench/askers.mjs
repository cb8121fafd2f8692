// Clients of the load generator that begin executions, and read nothing of them.
import { Agent, request } from 'node:http';
import { answer } from './child.mjs';

/**
 * Sends the same request `count` times, over `clients` connections.
 * @returns `{ms, faults}`: what they took together, and each answer that was not 202
 */
answer('ask', async ({ port, path, body, count, clients }) => {
  const agent = new Agent({ keepAlive: true, maxSockets: clients });
  const options = { agent, port, host: '127.0.0.1', path, method: 'POST' };
  const headers = { 'Content-Type': 'application/json', 'Content-Length': Buffer.byteLength(body) };
  const faults = [];
  const begun = performance.now();
  let left = count;
  const askOnAndOn = async () => {
    while (left-- > 0 && faults.length === 0) {
      const fault = await ask({ ...options, headers }, body);
      if (fault !== undefined) faults.push(fault);
    }
  };
  await Promise.all(Array.from({ length: clients }, askOnAndOn));
  agent.destroy();
  return { ms: performance.now() - begun, faults };
});

/** Resolves when the answer is over, with what is wrong with it. */
function ask(options, body) {
  return new Promise((resolve) => {
    const fail = (error) => resolve(`a request failed: ${error.message}`);
    const sent = request(options, (response) => {
      const { statusCode } = response;
      response.resume();
      response.on('error', fail);
      response.on('end', () =>
        resolve(statusCode === 202 ? undefined : `a request was answered ${statusCode}`),
      );
    });
    sent.on('error', fail);
    sent.end(body);
  });
}

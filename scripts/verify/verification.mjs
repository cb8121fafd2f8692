import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { UnreachableError } from '../sse-client.mjs';
import { checkProblem } from './stream-rules.mjs';

/** Everything that a careless server could trip over: line ends, a forged event, quotes, and characters of 2 to 4 bytes. */
export const QUERY =
  'Grüße 🌍 "to" \\ you,\ttab\r\nline\u2028separator\u0085\n\nid: 1\nevent: forged\ndata: {"type":"status","status":"completed"}\n\n\u0000 end ';

const HISTORY = [
  { actor: 'user', content: 'Hello' },
  { actor: 'assistant', content: 'Hi' },
];

/** One run of all checks against a server, with a workflow and a deployment of its own, both called `name`. */
export class Verification {
  held = 0;
  broken = 0;
  name = `verify-${randomUUID()}`;
  /** @type {{workflow_id: string} | undefined} */
  workflow;
  /** Of the executions that were accepted, oldest first. */
  executionIds = [];

  /** @param {import('../sse-client.mjs').Client} client */
  constructor(client) {
    this.client = client;
  }

  /** Prints whether a promise holds. @returns {Promise<any>} what `test` gives, or undefined if it throws */
  check = async (promise, test) => {
    try {
      const value = await test();
      this.held += 1;
      console.log(`ok      ${promise}`);
      return value ?? true;
    } catch (error) {
      if (error instanceof UnreachableError || this.client.signal.aborted) throw error;
      this.broken += 1;
      console.log(`FAILED  ${promise}\n${shorten(error.message).replace(/^/gm, '          ')}`);
      return undefined;
    }
  };

  /** The body of an answer that must be 200. */
  get = async (path) => {
    const { status, body } = await this.client.send('GET', path);
    assert.equal(status, 200, `GET ${path} answers ${status}: ${JSON.stringify(body)}`);
    return body;
  };

  post = (path, body) => {
    return this.client.send('POST', path, { body });
  };

  /** Runs the deployment with the query, in the way of the route's end; the answer's body as `body` and `bytes`. */
  execute = async (way, more = {}, headers = {}) => {
    const answer = await this.stream('POST', `/api/workflows/execute${way}`, {
      body: { deployment_name: this.name, query: QUERY, chat_history: HISTORY, ...more },
      headers,
    });
    const execution_id = answer.headers.get('content-location')?.split('/').at(-1);
    // A repeated request gets an execution that is there already.
    if (execution_id && !this.executionIds.includes(execution_id)) this.executionIds.push(execution_id);
    return answer;
  };

  stream = async (method, path, options) => {
    const response = await this.client.open(method, path, options);
    const bytes = new Uint8Array(await response.arrayBuffer());
    const { status, headers } = response;
    const isJson = /json/.test(headers.get('content-type') ?? '');
    return { status, headers, bytes, body: isJson ? JSON.parse(new TextDecoder().decode(bytes)) : undefined };
  };

  /** What all chunks of an execution share. */
  origin = (execution_id) => {
    return { deployment_name: this.name, workflow_id: this.workflow?.workflow_id, execution_id };
  };

  /** Checks how many executions the server accepts during `requests`, by its own list. */
  started = async (expected, requests) => {
    const list = `/api/executions?deployment_name=${this.name}&limit=1000`;
    const before = (await this.get(list)).items.length;
    const answers = await requests();
    const more = (await this.get(list)).items.length - before;
    assert.equal(more, expected, `${more} executions were started, not ${expected}`);
    return answers;
  };

  /** Removes what was made. */
  cleanUp = async () => {
    if (!this.workflow) return;
    await this.check('the deployment and the workflow are deleted', async () => {
      const path = `/api/workflows/${this.workflow?.workflow_id}`;
      const deployment = await this.client.send('DELETE', `/api/workflows/deployments/${this.name}`);
      assert.ok([204, 404].includes(deployment.status), `the deployment: ${deployment.status}`);
      const workflow = await this.client.send('DELETE', path);
      assert.equal(workflow.status, 204, `the workflow: ${workflow.status}`);
      checkProblem(await this.client.send('GET', path), 404, 'workflow_not_found');
    });
  };
}

/** Differences can be as long as a stream. */
function shorten(message) {
  const lines = message.split('\n').slice(0, 12);
  return lines.map((line) => (line.length > 300 ? `${line.slice(0, 300)}…` : line)).join('\n');
}

#!/usr/bin/env node
/**
 * Checks a running server against what its clients are promised: creates a workflow, deploys it, runs it in every way,
 * looks at each byte of its streams, and removes what it made. Prints a line for each promise; exits with 1 if one is broken.
 */
import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { parseArgs } from 'node:util';
import { Client, UnreachableError } from './sse-client.mjs';
import { checkBatches } from './verify/batches.mjs';
import {
  checkAsync,
  checkCancel,
  checkExecute,
  checkFailure,
  checkProgressChunks,
  checkResume,
  checkStream,
} from './verify/executions.mjs';
import { checkIdempotencyKeys, checkRepeatedPost } from './verify/repeated-requests.mjs';
import { checkStatusEvents } from './verify/status-events.mjs';
import { checkProblem, UUID } from './verify/stream-rules.mjs';
import { Verification } from './verify/verification.mjs';
import { checkWebSocket } from './verify/websocket.mjs';

/** What is checked, in this order. */
const PARTS = {
  refusals: checkRefusals,
  streams: checkStreams,
  executions: checkExecutions,
  status: checkStatusEvents,
  batches: checkBatches,
  websocket: checkWebSocket,
  records: checkRecords,
  stop: checkStop,
};

const HELP = `Usage: npm run verify -- [--url http://127.0.0.1:8000] [--only ${Object.keys(PARTS).join(',')}]

Checks a running server against what its clients are promised, and removes what it made there. Needs no model.`;

/** The built-in model answers at once. */
const ANSWER_TIMEOUT_MS = 30_000;

/** `outline` writes, `answer` repeats it; a run whose variable `ready` is no truth value fails between the two. */
const CONFIGURATION = {
  agents: [
    { agent_id: 'outline', agent_type: 'template', config: { template: 'Asked: {{ query }}' } },
    { agent_id: 'answer', agent_type: 'llm', config: { model: 'offline/echo', system_prompt: 'Repeat.' } },
  ],
  connections: [
    {
      source_agent_id: 'outline',
      target_agent_id: 'answer',
      connection_type: 'conditional',
      conditions: { expression: 'variables.ready' },
    },
  ],
};

/** @param {(keyof typeof PARTS)[]} parts */
async function verify(verification, parts) {
  await checkServer(verification);
  verification.workflow = await checkWorkflow(verification);
  if (!verification.workflow || !(await checkDeployment(verification))) return;
  for (const [part, check] of Object.entries(PARTS)) if (parts.includes(part)) await check(verification);
}

async function checkStreams(verification) {
  const response = await checkExecute(verification);
  const stream = await checkStream(verification, response);
  if (stream) await checkResume(verification, stream);
  if (stream) await checkRepeatedPost(verification, stream);
  await checkIdempotencyKeys(verification);
}

async function checkExecutions(verification) {
  await checkProgressChunks(verification);
  await checkFailure(verification);
  await checkAsync(verification);
  await checkCancel(verification);
}

async function checkServer({ check, get, client }) {
  await check('the server is alive and ready', async () => {
    await get('/health/live');
    assert.equal((await get('/health/ready')).status, 'ok');
  });
  await check('metrics are in the text format of Prometheus, or kept from outside by a proxy', async () => {
    const { status, body } = await client.send('GET', '/metrics');
    if (status === 404) return;
    assert.match(body, /^# TYPE agent_studio_executions_total counter$/m);
  });
  await check('the API is described in OpenAPI 3.1, with a page to try it', async () => {
    const { openapi, paths } = await get('/api/openapi.json');
    assert.match(openapi, /^3\.1\./);
    assert.ok(paths['/api/workflows/execute/stream']?.post, 'the route that streams is not described');
    assert.match(await get('/api/docs'), /<html/i);
  });
  await check(
    'pages of other origins can repeat and resume: they may send the key and the cursor, and read the headers',
    async () => {
      const headers = { origin: 'http://example.com', 'access-control-request-method': 'POST' };
      const preflight = await client.send('OPTIONS', '/api/workflows/execute/stream', { headers });
      const list = (name) => (preflight.headers.get(name) ?? '').toLowerCase().split(/, */);
      for (const header of ['idempotency-key', 'last-event-id']) {
        assert.ok(list('access-control-allow-headers').includes(header), `${header} is not allowed`);
      }
      for (const header of ['location', 'content-location']) {
        assert.ok(list('access-control-expose-headers').includes(header), `${header} is not exposed`);
      }
    },
  );
}

async function checkWorkflow({ check, post, name }) {
  await check('an invalid graph is refused with 422 and every fault', async () => {
    const agents = [{ agent_id: 'a', agent_type: 'unheard-of', config: {} }];
    const connections = [{ source_agent_id: 'a', target_agent_id: 'nobody' }];
    const answer = await post('/api/workflows', { name, configuration: { agents, connections } });
    const faults = checkProblem(answer, 422, 'workflow_invalid').errors.map(({ pointer }) => pointer);
    assert.ok(faults.includes('/configuration/agents/0/agent_type'), `faults at ${faults}`);
    assert.ok(faults.includes('/configuration/connections/0/target_agent_id'), `faults at ${faults}`);
  });
  return check('a workflow is created', async () => {
    const answer = await post('/api/workflows', { name, configuration: CONFIGURATION });
    const { status, headers, body } = answer;
    assert.equal(status, 201);
    assert.match(body.workflow_id, UUID);
    assert.equal(headers.get('location'), `/api/workflows/${body.workflow_id}`);
    assert.deepEqual(body.configuration, CONFIGURATION);
    return body;
  });
}

async function checkDeployment({ check, get, post, client, name, workflow }) {
  const path = `/api/workflows/${workflow.workflow_id}`;
  return check('it is deployed once, and can not be deleted meanwhile', async () => {
    const request = { deployment_name: name, runtime_config: { variables: { ready: true } } };
    const { status, body: deployment } = await post(`${path}/deploy`, request);
    assert.equal(status, 201);
    assert.equal(deployment.status, 'active');
    const { deployment_id } = await get(`/api/deployments/${name}`);
    assert.equal(deployment_id, deployment.deployment_id);
    const active = await get('/api/workflows/deployments/active');
    assert.ok(
      active.some((item) => item.deployment_id === deployment_id),
      'it is not listed',
    );
    checkProblem(await post(`${path}/deploy`, request), 409, 'deployment_exists');
    checkProblem(await client.send('DELETE', path), 409, 'workflow_in_use');
  });
}

async function checkRefusals({ check, post, client, name }) {
  /** @param {{body: unknown, status: number, code: string}} expected */
  const checkRefused = async ({ body, status, code }) => {
    const problems = [];
    for (const way of ['', '/stream', '/async']) {
      problems.push(checkProblem(await post(`/api/workflows/execute${way}`, body), status, code));
    }
    return problems;
  };
  const request = { deployment_name: name, query: 'hello' };
  await check('an unknown deployment is refused with 404 before a stream starts', () => {
    const body = { ...request, deployment_name: `${name}-unknown` };
    return checkRefused({ body, status: 404, code: 'deployment_not_found' });
  });
  await check('a body that is no JSON is refused with 400', () =>
    checkRefused({ body: '{', status: 400, code: 'invalid_json' }),
  );
  await check('an invalid body is refused with 400 and JSON pointers', async () => {
    const body = { ...request, query: 1, chat_history: [{ actor: 'nobody', content: 'x' }], more: 1 };
    for (const { errors } of await checkRefused({ body, status: 400, code: 'validation_failed' })) {
      const pointers = new Set(errors.map(({ pointer }) => pointer));
      assert.deepEqual(pointers, new Set(['/more', '/query', '/chat_history/0/actor']));
    }
  });
  await check('an override that is not allowed is refused with 400', () => {
    const body = { ...request, runtime_overrides: { system_prompt: 'x' } };
    return checkRefused({ body, status: 400, code: 'override_not_allowed' });
  });
  await check('an unknown execution is answered with 404', async () => {
    for (const part of ['', '/stream', '/steps', '/progress']) {
      const answer = await client.send('GET', `/api/executions/${randomUUID()}${part}`);
      checkProblem(answer, 404, 'execution_not_found');
    }
  });
}

async function checkRecords({ executionIds, check, get, name }) {
  const expected = [...executionIds].reverse();
  const executions = [];
  await check('the executions are listed, newest first, page by page', async () => {
    let cursor = '';
    do {
      const page = await get(`/api/executions?deployment_name=${name}&limit=2${cursor}`);
      executions.push(...page.items);
      cursor = page.next_cursor && `&cursor=${page.next_cursor}`;
    } while (cursor);
    assert.deepEqual(
      executions.map(({ execution_id }) => execution_id),
      expected,
    );
  });
  await check('the statistics count exactly these executions', async () => {
    const sum = (items, field) => items.reduce((total, item) => total + item[field], 0);
    const statistics = await get(`/api/deployments/${name}/statistics?bucket=minute`);
    const countOf = (end) => executions.filter(({ status }) => status === end).length;
    const counts = {
      execution_count: expected.length,
      success_count: countOf('completed'),
      error_count: countOf('error'),
      cancelled_count: countOf('cancelled'),
    };
    for (const [field, count] of Object.entries(counts)) {
      assert.equal(statistics[field], count, `${field} is ${statistics[field]}, and ${count} were`);
      assert.equal(sum(statistics.series, field), count, `${field} of the time series differs`);
    }
    assert.equal(statistics.error_rate, counts.error_count / expected.length);
    const usage = executions.map((execution) => execution.usage);
    assert.deepEqual(statistics.usage, {
      input_tokens: sum(usage, 'input_tokens'),
      output_tokens: sum(usage, 'output_tokens'),
    });
    assert.ok(statistics.duration_ms.p50 <= statistics.duration_ms.p99);
  });
}

async function checkStop({ check, post, name }) {
  await check('a stopped deployment takes no more, and says that it is not active', async () => {
    const { status, body } = await post(`/api/workflows/deployments/${name}/stop`);
    assert.equal(status, 200);
    assert.equal(body.status, 'inactive');
    const answer = await post('/api/workflows/execute/stream', {
      deployment_name: name,
      query: 'hello',
    });
    assert.match(checkProblem(answer, 404, 'deployment_not_found').detail, /not active|inactive/);
  });
}

async function run(url, parts) {
  const interrupted = new AbortController();
  for (const name of ['SIGINT', 'SIGTERM']) {
    process.on(name, () => interrupted.abort(new Error(`Stopped by ${name}.`)));
  }
  const verification = new Verification(new Client(url, interrupted.signal, ANSWER_TIMEOUT_MS));
  console.log(`Verifying ${url}\n`);
  try {
    await verify(verification, parts);
  } catch (error) {
    process.exitCode = 1;
    const advice =
      'Start a server with npm start, or say where it is: npm run verify -- --url http://host:port';
    console.error(error instanceof UnreachableError ? `${error.message}\n${advice}` : error.message);
  }
  verification.client = new Client(url, new AbortController().signal, ANSWER_TIMEOUT_MS);
  await verification
    .cleanUp()
    .catch((error) => console.error(`What was made could not be deleted. ${error.message}`));
  const { held, broken } = verification;
  if (held + broken > 0) console.log(`\n${held} held, ${broken} failed`);
  if (broken > 0) process.exitCode = 1;
}

try {
  const { values } = parseArgs({
    options: { url: { type: 'string' }, only: { type: 'string' }, help: { type: 'boolean', short: 'h' } },
  });
  const { url = 'http://127.0.0.1:8000', only, help } = values;
  if (!URL.canParse(url)) throw new Error(`"${url}" is no URL.`);
  const parts = only?.split(',') ?? Object.keys(PARTS);
  const unknown = parts.find((part) => !Object.hasOwn(PARTS, part));
  if (unknown !== undefined) throw new Error(`There is no part "${unknown}" to check.`);
  if (help) console.log(HELP);
  else await run(url, parts);
} catch (error) {
  console.error(`${error.message}\n\n${HELP}`);
  process.exitCode = 1;
}

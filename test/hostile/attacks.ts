import { Client } from 'pg';
import type { TestDatabase } from '../support/database.js';
import { rounds } from '../support/effort.js';
import { echo, upstreamAgent } from '../support/studio.js';
import type { Studio } from '../support/studio.js';
import type { ServerProcess } from '../support/studio-process.js';
import { chatDelta, chatEnd, writeStream } from '../support/upstream.js';
import type { UpstreamAnswer } from '../support/upstream.js';

/** What is attacked. */
export interface Target {
  server: ServerProcess;
  studio: Studio;
  database: TestDatabase;
  /** Says how the models `upstream/…` answer from here on. */
  serve(answer: UpstreamAnswer): void;
}

/** What one client can do that could harm others. */
export interface Attack {
  /** As the name of a test: what harms nobody else. */
  name: string;
  /** It has megabytes to send or to work on, and runs in full effort only. */
  isDear?: boolean;
  /** Attacks, and resolves with how each request of it ended: {@link endOf}. */
  run(target: Target): Promise<string[]>;
  /** The ends that are documented for it. */
  ends: string[];
}

type Answer = { status: number; body: unknown };

/** The code of a problem, or else the HTTP status. */
export function endOf({ status, body }: Answer): string {
  return typeof body === 'object' && body !== null && 'code' in body ? String(body.code) : String(status);
}

/** A request that is not answered for so long ends its attack, ms. */
const GIVE_UP_MS = 60_000;

/** How a request ended: {@link endOf} its answer, or that none came, so that what the attack holds is let go. */
async function endWithin(request: Promise<Answer>): Promise<string> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<string>((resolve) => {
    timer = setTimeout(() => resolve('no answer'), GIVE_UP_MS);
  });
  try {
    return await Promise.race([request.then(endOf, String), late]);
  } finally {
    clearTimeout(timer);
  }
}

const times = <Item>(count: number, item: (index: number) => Item): Item[] =>
  Array.from({ length: count }, (_, index) => item(index));

const saying = (count: number, template: string) => ({
  agents: times(count, (index) => ({
    agent_id: `a${index}`,
    agent_type: 'template',
    config: { template },
  })),
});

/** Deploys a workflow and executes it so many times at once. */
async function execute(
  { studio }: Target,
  configuration: Parameters<Studio['deploy']>[0],
  body: object = {},
  count = 1,
): Promise<string[]> {
  const deployment_name = await studio.deploy(configuration, { allowed_overrides: ['variables'] });
  const request = { deployment_name, query: 'x', ...body };
  return Promise.all(times(count, () => endWithin(studio.execute(request))));
}

/** So many template agents, each of which says a variable of almost 1 MiB, in JSON, 29 times. */
const repeating = (target: Target, agents: number, x: string) =>
  execute(target, saying(agents, '{{ variables.x }}'.repeat(29)), {
    runtime_overrides: { variables: { x } },
  });

/** Runs `work` while another client holds the rows of all deployments locked, as one does that is cut off while it deploys. */
async function whileDeploymentsAreLocked<Result>(
  { database }: Target,
  work: () => Promise<Result>,
): Promise<Result> {
  const client = new Client({ connectionString: database.url });
  await client.connect();
  try {
    await client.query('BEGIN');
    await client.query('SELECT 1 FROM deployment FOR UPDATE');
    return await work();
  } finally {
    await client.end();
  }
}

const post = ({ studio }: Target, path: string, body: unknown) =>
  endWithin(studio.json(path, { method: 'POST', body }));

/** A new attack is one more entry: what it does, and how its requests may end. */
export const ATTACKS: Attack[] = [
  {
    name: 'a batch of far too many items, none of which is one',
    isDear: true,
    ends: ['validation_failed'],
    run: async (target) => [
      await post(
        target,
        '/api/workflows/execute/batch',
        `{"deployment_name":"x","items":[${'{},'.repeat(349_000)}{}]}`,
      ),
    ],
  },
  {
    name: 'forty conditions that search for very long',
    ends: ['200', 'agent_error'],
    run: (target) =>
      execute(
        target,
        {
          ...saying(41, 'x'),
          connections: times(40, (index) => ({
            source_agent_id: 'a0',
            target_agent_id: `a${index + 1}`,
            connection_type: 'conditional',
            conditions: { expression: 'query.matches("^(a+)+$")' },
          })),
        },
        { query: `${'a'.repeat(40)}!` },
      ),
  },
  {
    name: 'a template that doubles a text again and again, and compares it',
    ends: ['agent_error', 'output_too_large'],
    run: (target) => {
      const double = (name: string) =>
        `{% capture ${name} %}x{% endcapture %}` +
        `{% capture ${name} %}{{ ${name} }}{{ ${name} }}{% endcapture %}`.repeat(28);
      return execute(target, saying(1, `${double('t')}${double('u')}{% if t == u %}same{% endif %}`));
    },
  },
  {
    name: 'a megabyte of control characters, which agents repeat until no string can hold it',
    isDear: true,
    ends: ['output_too_large'],
    run: (target) => repeating(target, 22, '\u0001'.repeat(170_000)),
  },
  {
    name: 'a megabyte of plain text, which agents repeat until no statement can hold it',
    isDear: true,
    ends: ['output_too_large'],
    run: (target) => repeating(target, 100, 'x'.repeat(170_000)),
  },
  {
    name: 'many queries of almost a megabyte at once',
    isDear: true,
    ends: ['200'],
    run: (target) => execute(target, echo(), { query: 'x'.repeat(1_000_000) }, 10),
  },
  {
    name: 'a model that reports more tokens than a number can hold',
    ends: ['200'],
    run: (target) => {
      const tokens = 2 ** 31 - 1;
      target.serve((response) => {
        const usage = { prompt_tokens: tokens, completion_tokens: tokens, total_tokens: tokens };
        writeStream(response, chatDelta('text'), chatEnd(usage));
        response.end();
      });
      const [writer] = upstreamAgent().agents;
      const agents = ['first', 'second'].map((agent_id) => ({ ...writer, agent_id }));
      return execute(target, { agents }, {}, rounds(20, 5));
    },
  },
  {
    name: 'executions of deployments that another client has locked',
    ends: ['200'],
    run: async (target) => {
      const deployment_name = await target.studio.deploy(echo());
      return whileDeploymentsAreLocked(target, () =>
        Promise.all(
          times(rounds(20, 5), () => endWithin(target.studio.execute({ deployment_name, query: 'x' }))),
        ),
      );
    },
  },
];

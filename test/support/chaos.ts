import { inspect } from 'node:util';
import { Stack } from '../../scripts/stack/stack.mjs';
import type { StackOptions } from '../../scripts/stack/stack.mjs';
import type { Step } from '../../src/database/entities/step.entity.js';
import type { Execution } from '../../src/database/entities/execution.entity.js';
import { CallLedger, markerOf } from './call-ledger.js';
import type { ModelCall } from './call-ledger.js';
import { ChaosClient } from './chaos-clients.js';
import type { ChaosRequest, ClientRun } from './chaos-clients.js';
import { runStatement } from './database.js';
import { Random, SEED } from './random.js';
import { ownerOfConnection } from './server-processes.js';
import { Studio, until } from './studio.js';
import type { Frame } from './studio.js';

/** What carries the queue in this run: see jest.chaos.config.js. */
export const QUEUE: 'postgres' | 'redis' = globalThis.CHAOS_QUEUE ?? 'postgres';
/** How long a silent worker keeps its executions. */
export const LOCK_MS = 1000;
/** Only ends a test that hangs. */
export const PATIENCE_MS = 60_000;
/** The start of its processes, on a machine that is busy. */
export const START_MS = 180_000;
/** The same for a whole test; Jest's own limit, which reports nothing, has to be longer. */
const HANG_MS = 110_000;

/** Keeps when each step was completed for the first time: a step that is run again overwrites its own row. */
const KEEP_COMPLETIONS = `
  CREATE TABLE chaos_completion (execution_id uuid, agent_id text, completed_at timestamptz, PRIMARY KEY (execution_id, agent_id));
  CREATE FUNCTION chaos_keep_completion() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
      INSERT INTO chaos_completion VALUES (NEW.execution_id, NEW.agent_id, clock_timestamp()) ON CONFLICT DO NOTHING;
      RETURN NULL;
    END $$;
  CREATE TRIGGER chaos_completion AFTER INSERT OR UPDATE ON step FOR EACH ROW WHEN (NEW.status = 'completed')
    EXECUTE FUNCTION chaos_keep_completion();`;

/** When an agent's step was completed first. */
export interface Completion {
  execution_id: string;
  agent_id: string;
  completed_at: Date;
}

const UUID_V7 = /[\da-f]{8}-[\da-f]{4}-7[\da-f]{3}-[\da-f]{4}-[\da-f]{12}/g;

declare global {
  var CHAOS_QUEUE: 'postgres' | 'redis' | undefined;
}

export type StackProcess = Stack['workers'][number];

/** Several real processes of the server, the models they call, and the clients that call them. */
export class Chaos {
  readonly random = new Random();
  private markers = 0;
  /** When the last process was killed; see {@link kill}. */
  killedAt = 0;
  kills = 0;

  private constructor(
    readonly stack: Stack,
    readonly ledger: CallLedger,
  ) {}

  static async start(options: StackOptions = {}): Promise<Chaos> {
    process.stderr.write(`CHAOS_SEED=${SEED}, the queue is in ${QUEUE}\n`);
    const ledger = await CallLedger.start();
    const env = {
      JOB_LOCK_MS: String(LOCK_MS),
      SHUTDOWN_GRACE_MS: '200',
      HEARTBEAT_INTERVAL_MS: '1000',
      LOG_LEVEL: 'warn',
      MODEL_PROVIDERS: ledger.providers,
      ...options.env,
    };
    // Another build than this repository's: to see a test fail on a server that was broken on purpose.
    const dist = process.env.CHAOS_DIST;
    const own = { ...(dist ? { dist } : {}), redis: QUEUE === 'redis', nginx: false };
    try {
      const chaos = new Chaos(await Stack.start({ ...own, ...options, env }), ledger);
      await chaos.sql(KEEP_COMPLETIONS);
      return chaos;
    } catch (error) {
      await ledger.stop();
      throw error;
    }
  }

  async stop(): Promise<void> {
    await this.stack.stop();
    await this.ledger.stop();
  }

  get apiUrls(): string[] {
    return this.stack.apis.map(({ url }) => url);
  }

  /** A client of some api process. */
  studio(index = 0): Studio {
    return new Studio(this.apiUrls[index] ?? '');
  }

  sql<Row extends object>(text: string, values: unknown[] = []): Promise<Row[]> {
    return runStatement<Row>(this.stack.databaseUrl, text, values);
  }

  /** A query that no other execution has, to find its calls with. */
  marker(name = 'run'): string {
    return markerOf(`${name}-${++this.markers}`);
  }

  client(deployment_name: string, query = this.marker(), urls = this.apiUrls): ChaosClient {
    const request: ChaosRequest = { deployment_name, query };
    return new ChaosClient(request, this.clientOptions(urls));
  }

  private clientOptions(urls = this.apiUrls) {
    return { urls, random: new Random(SEED + this.markers), patienceMs: PATIENCE_MS };
  }

  /** Which process made a call that is still open. */
  async callerOf({ marker, port }: ModelCall): Promise<StackProcess> {
    const { workers } = this.stack;
    // The kernel's list may miss a connection while others come and go.
    return until(() => {
      const pid = ownerOfConnection(
        [port, this.ledger.port],
        workers.map((worker) => worker.pid ?? 0),
      );
      return workers.find((worker) => worker.pid === pid);
    }, 1000).catch(() => {
      throw new Error(`No worker has the call of ${marker}.`);
    });
  }

  /** Ends a process without a word, and resolves when it is back. */
  async kill(process: StackProcess): Promise<void> {
    this.kills++;
    const back = process.restart('SIGKILL');
    this.killedAt = Date.now();
    await back;
  }

  /** Rows of executions, in the order of their acceptance. */
  rows(ids: string[]): Promise<Execution[]> {
    return this.sql<Execution>('SELECT * FROM execution WHERE execution_id = ANY ($1) ORDER BY 1', [ids]);
  }

  /** How far the log of an execution has come; 0 where there is none. */
  async lastSequence(marker: string): Promise<number> {
    const [row] = await this.sql<{ last: number | null }>(
      `SELECT max(execution_chunk.last_sequence) AS last FROM execution_chunk JOIN execution USING (execution_id)
        WHERE input->>'query' = $1`,
      [marker],
    );
    return row?.last ?? 0;
  }

  completions(ids: string[]): Promise<Completion[]> {
    return this.sql<Completion>('SELECT * FROM chaos_completion WHERE execution_id = ANY ($1)', [ids]);
  }

  steps(ids: string[]): Promise<Step[]> {
    return this.sql<Step>('SELECT * FROM step WHERE execution_id = ANY ($1) ORDER BY started_at', [ids]);
  }

  /** The whole log of an execution that has ended. A connection that was kept from before a kill may turn out to be dead. */
  async log(executionId: string): Promise<Frame[]> {
    const client = new ChaosClient({ deployment_name: '', query: '' }, this.clientOptions());
    client.run.executionId = executionId;
    return (await client.stream()).frames;
  }

  /** Resolves when all of these have ended. */
  async ended(runs: ClientRun[], ms: number): Promise<void> {
    const ids = runs.map(({ executionId }) => executionId);
    const unfinished = () =>
      this.sql<{ execution_id: string }>(
        `SELECT execution_id FROM execution WHERE execution_id = ANY ($1) AND status IN ('queued', 'running')`,
        [ids],
      );
    await until(async () => (await unfinished()).length === 0, ms).catch(async () => {
      const rows = await unfinished();
      const some = await Promise.all(rows.slice(0, 3).map(({ execution_id }) => this.describe(execution_id)));
      throw new Error(`${rows.length} of ${ids.length} have not ended after ${ms} ms.\n${some.join('\n')}`);
    });
  }

  /** Everything that is known about an execution, for the report of a failure. */
  async describe(id: string): Promise<string> {
    const [row] = await this.rows([id]);
    const steps = await this.steps([id]);
    const tail = await this.sql<{ first_sequence: number; last_sequence: number; chunks: string }>(
      `SELECT first_sequence, last_sequence, right(chunks, 400) AS chunks FROM execution_chunk
        WHERE execution_id = $1 ORDER BY first_sequence DESC LIMIT 4`,
      [id],
    );
    const marker = row?.input.query ?? '';
    const calls = this.ledger.of(marker).map((call) => ({ ...call, closed: undefined }));
    const jobs =
      QUEUE === 'postgres' ? await this.sql('SELECT * FROM bullmq.job WHERE id = $1', [id]) : 'in Redis';
    return [{ execution: row }, { steps }, { tail }, { calls }, { jobs }]
      .map((part) => JSON.stringify(part))
      .join('\n');
  }

  /** Adds the seed, some executions and the processes' last words to the failure of a test, and to its hanging. */
  async reporting(work: () => Promise<void>, hangsAfterMs = HANG_MS): Promise<void> {
    let timer: NodeJS.Timeout | undefined;
    const hangs = new Promise<never>((_, reject) => {
      timer = setTimeout(() => reject(new Error(`The test hangs after ${hangsAfterMs} ms.`)), hangsAfterMs);
    });
    try {
      await Promise.race([work(), hangs]);
    } catch (error) {
      const text = textOf(error);
      const executions = await this.describeSome(text).catch(inspect);
      const message = [
        `CHAOS_SEED=${SEED}, the queue is in ${QUEUE}`,
        text,
        executions,
        this.stack.output,
      ].join('\n');
      throw Object.assign(new Error(message), { stack: message });
    } finally {
      clearTimeout(timer);
    }
  }

  /** Those that a text names, or else some that have not ended. */
  private async describeSome(text: string): Promise<string> {
    const named = [...new Set(text.match(UUID_V7))].slice(0, 2);
    const unfinished = await this.sql<{ execution_id: string }>(
      "SELECT execution_id FROM execution WHERE status IN ('queued', 'running') LIMIT 3",
    );
    const ids = named.length > 0 ? named : unfinished.map(({ execution_id }) => execution_id);
    return (await Promise.all(ids.map((id) => this.describe(id)))).join('\n');
  }
}

/** With its causes; of Jest's errors the stack says all. */
function textOf(error: unknown): string {
  return error instanceof Error && !error.cause ? (error.stack ?? error.message) : inspect(error);
}

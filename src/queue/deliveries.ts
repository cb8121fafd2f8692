import { RedisQueueBackend } from 'bullmq';
import type { IQueueBackend } from 'bullmq';
import type { Pool } from 'pg';
import type { Delivery } from './execution-queue.js';

/** No lock of an earlier build's process is longer, which renews it; those of this build are, and are never renewed. */
const LONGEST_RENEWED_LOCK_MS = 600_000;

const ACTIVE = {
  name: 'queue-deliveries',
  text: `SELECT id, concat_ws(' ', lock_token, locked_until_ms) AS sign FROM bullmq.job
          WHERE queue = $1 AND state = 'active'`,
};

const COMMAND = 'agentStudioDeliveries';
/** Of each job in the list the id, and the token and the time to live of its lock. */
const LUA = `
  local found = {}
  for _, id in ipairs(redis.call('LRANGE', KEYS[1], 0, -1)) do
    local lock = ARGV[1] .. id .. ':lock'
    table.insert(found, id)
    table.insert(found, redis.call('GET', lock) or '')
    table.insert(found, redis.call('PTTL', lock))
  end
  return found`;

/** The jobs that workers have, with their locks as the sign of life. */
export async function readDeliveries(backend: IQueueBackend, queue: string, pool: Pool): Promise<Delivery[]> {
  if (backend instanceof RedisQueueBackend) return readFromRedis(backend);
  const { rows } = await pool.query<{ id: string; sign: string }>({ ...ACTIVE, values: [queue] });
  return rows.map(({ id, sign }) => ({ executionId: id, sign }));
}

/** There a lock runs out by the server's own clock: as long as one exists that is renewed, its worker lives. */
async function readFromRedis(backend: RedisQueueBackend): Promise<Delivery[]> {
  const client = await backend.client;
  client.defineCommand(COMMAND, { numberOfKeys: 1, lua: LUA, readOnly: true });
  const args = [backend.toKey('active'), backend.toKey('')];
  const found = (await client.runCommand(COMMAND, args)) as (string | number)[];
  const deliveries: Delivery[] = [];
  for (let index = 0; index < found.length; index += 3) {
    const [id = '', token = '', leftMs = 0] = found.slice(index, index + 3);
    const lives = Number(leftMs) > 0 && Number(leftMs) <= LONGEST_RENEWED_LOCK_MS;
    deliveries.push({
      executionId: String(id),
      sign: lives ? `${token} ${performance.now()}` : String(token),
    });
  }
  return deliveries;
}

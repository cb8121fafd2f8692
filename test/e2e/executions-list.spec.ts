import { afterAll, beforeAll, expect, it } from '@jest/globals';
import { startTestApp } from '../support/app.js';
import type { TestApp } from '../support/app.js';
import { DeploymentRoutes } from '../support/deployments.js';
import { itInFull } from '../support/effort.js';
import { insertExecutions } from '../support/ended-executions.js';
import { Studio } from '../support/studio.js';

interface Page {
  items: { execution_id: string; status: string }[];
  next_cursor?: string;
}

let server: TestApp;
let studio: Studio;
let routes: DeploymentRoutes;

beforeAll(async () => {
  server = await startTestApp({ ROLE: 'api' });
  studio = new Studio(server.url);
  routes = new DeploymentRoutes(server.url);
});
afterAll(() => server.close());

const page = async (query: string) => (await studio.json<Page>(`/api/executions?${query}`)).body;

/** All pages of a list, and how many there were. */
async function all(query: string): Promise<{ ids: string[]; pages: number }> {
  const ids: string[] = [];
  for (let pages = 1, cursor = ''; ; pages++) {
    const { items, next_cursor } = await page(`${query}${cursor}`);
    ids.push(...items.map(({ execution_id }) => execution_id));
    if (next_cursor === undefined) return { ids, pages };
    cursor = `&cursor=${next_cursor}`;
  }
}

const executions = (count: number, status: string) =>
  Array.from({ length: count }, () => ({
    status,
    finishedAt: status === 'running' ? null : new Date(),
    durationMs: 10,
  }));

itInFull(
  'a filter that few executions pass looks at so many for a page, and finds all of them over the pages',
  async () => {
    const rare = await routes.deployed();
    const common = await routes.deployed();
    const oldest = await insertExecutions(server.database, rare, executions(3, 'error'));
    await insertExecutions(server.database, common, executions(125_000, 'completed'));
    const newest = await insertExecutions(server.database, rare, [
      ...executions(2, 'running'),
      ...executions(2, 'completed'),
    ]);
    const expected = [...oldest, ...newest].toReversed();
    const first = await page(`deployment_name=${rare.deployment_name}&limit=5`);
    expect(first.items.map(({ execution_id }) => execution_id)).toEqual(newest.toReversed());
    expect(first.next_cursor).toEqual(expect.any(String));
    expect(await all(`deployment_name=${rare.deployment_name}`)).toEqual({ ids: expected, pages: 2 });
    expect((await all(`deployment_name=${rare.deployment_name}&limit=2`)).ids).toEqual(expected);
    expect((await all('status=error&limit=1000')).ids).toEqual(oldest.toReversed());
    // What has not ended is found by an index.
    expect(await all('status=running')).toEqual({ ids: newest.slice(0, 2).toReversed(), pages: 1 });
    expect(await all('status=queued')).toEqual({ ids: [], pages: 1 });
  },
);

it('a period bounds what is looked at, and a list of a page has no cursor', async () => {
  const { deployment_name } = await routes.deployed();
  const query = `deployment_name=${deployment_name}`;
  const tomorrow = new Date(Date.now() + 3 * 86_400_000).toISOString();
  for (const period of [
    `from=${tomorrow}`,
    'to=2020-01-01',
    'to=1960-01-01',
    'from=1960-01-01&to=1961-01-01',
  ]) {
    expect(await page(`${query}&${period}`)).toEqual({ items: [] });
  }
});

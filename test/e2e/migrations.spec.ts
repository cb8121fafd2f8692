import { expect, it } from '@jest/globals';
import { createDataSource, migrate } from '../../src/database/data-source.js';
import { createTestDatabase } from '../support/database.js';

it('the migrations make exactly the schema of the entities, also when several processes start at once', async () => {
  const database = await createTestDatabase();
  const open = () => createDataSource({ url: database.url, poolSize: 2 });
  const first = open();
  const sources = [first, open(), open()];
  try {
    await Promise.all(
      sources.map(async (source) => {
        await migrate(database.url);
        await source.initialize();
      }),
    );
    const { upQueries } = await first.driver.createSchemaBuilder().log();
    expect(upQueries.map(({ query }) => query)).toEqual([]);
    const applied = await database.query('SELECT name FROM migrations');
    expect(applied).toHaveLength(first.migrations.length);
  } finally {
    await Promise.all(sources.map((source) => source.destroy()));
    await database.drop();
  }
});

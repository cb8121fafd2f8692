import { createHash } from 'node:crypto';
import { relative } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';

const SOURCE = fileURLToPath(new URL('../../src/', import.meta.url));
const BUILT = new URL('../../dist/', import.meta.url);

/**
 * Puts the built module in the place of a source of the server, and the module itself in the place of a package's: loaded by Node,
 * once for all test files of a Jest worker. Jest's sandbox would load the server and its 2,800 modules anew for each of them,
 * which takes seconds.
 */
export default {
  async processAsync(_source, path) {
    const { url, names } = await outside(path);
    return { code: `export const { ${names} } = await importOutside(${JSON.stringify(url)});\n` };
  },
  async getCacheKeyAsync(_source, path) {
    const { url, names } = await outside(path);
    return createHash('sha256').update(`${url} ${names}`).digest('hex');
  },
};

async function outside(path) {
  const url = path.startsWith(SOURCE)
    ? new URL(relative(SOURCE, path).replace(/\.ts$/, '.js'), BUILT).href
    : pathToFileURL(path).href;
  const names = Object.keys(await import(url)).filter((name) => name !== 'default');
  return { url, names: names.join(', ') };
}

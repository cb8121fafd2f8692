import { queryObjects } from 'node:v8';

/**
 * Loaded into a server under test by `ServerProcess`, for what can't be seen from outside: how many objects of a class,
 * and how many bytes, its memory still holds after a garbage collection (which counting the objects begins with).
 */
process.on('message', ({ id, module, name }) => {
  if (module === undefined) return; // a question for another probe
  import(module).then(
    (exports) => {
      const count = queryObjects(exports[name]);
      const { heapUsed, external } = process.memoryUsage();
      process.send({ id, count, held: heapUsed + external });
    },
    (error) => process.send({ id, error: String(error) }),
  );
});
// The server ends when its own work has ended.
process.channel.unref();

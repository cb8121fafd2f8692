// Preloaded (`--import`) into every process of the benchmark, Agent Studio included: answers what the benchmark asks
// for over the IPC channel, and ends with it, so that nothing outlives a benchmark that was killed.
import { writeFile } from 'node:fs/promises';
import { Session } from 'node:inspector/promises';

const inspector = new Session();

const answers = {
  /** CPU µs used so far and resident bytes now, of the whole process. */
  usage: () => {
    const { user, system } = process.cpuUsage();
    return { cpu: user + system, rss: process.memoryUsage.rss() };
  },
  /** V8 leaves garbage in an idle process for ten seconds or for ever; without it, memory shows what is held. */
  collectGarbage: async () => {
    inspector.connect();
    await inspector.post('HeapProfiler.collectGarbage');
    inspector.disconnect();
  },
  startProfile: async () => {
    inspector.connect();
    await inspector.post('Profiler.enable');
    await inspector.post('Profiler.setSamplingInterval', { interval: 250 });
    await inspector.post('Profiler.start');
  },
  stopProfile: async (file) => {
    const { profile } = await inspector.post('Profiler.stop');
    inspector.disconnect();
    await writeFile(file, JSON.stringify(profile));
  },
};

process.on('message', async ({ id, question, argument }) => {
  try {
    process.send({ id, answer: await answers[question](argument) });
  } catch (error) {
    process.send({ id, error: error instanceof Error ? (error.stack ?? error.message) : String(error) });
  }
});
process.on('disconnect', () => process.exit());
// A server that has closed everything ends by itself.
process.channel.unref();

/** Adds a question that this process answers; what `handler` returns must be JSON. */
export function answer(question, handler) {
  answers[question] = handler;
}

/** Tells the benchmark on which port of 127.0.0.1 this process listens. */
export function announce(server) {
  server.listen({ port: 0, host: '127.0.0.1', backlog: 1024 }, () =>
    process.send({ ready: server.address().port }),
  );
}

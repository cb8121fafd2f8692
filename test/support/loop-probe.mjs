import { readFileSync } from 'node:fs';

/**
 * Loaded into a server under test by `ServerProcess`: how long its event loop was silent, which nobody sees from outside
 * on a busy machine. What the thread waited for a processor is no silence of its own and does not count (Linux).
 */
const TICK_MS = 10;

let last = { at: performance.now(), waited: waitedMs() };
let longest = 0;

const timer = setInterval(() => {
  const now = { at: performance.now(), waited: waitedMs() };
  longest = Math.max(longest, now.at - last.at - TICK_MS - (now.waited - last.waited));
  last = now;
}, TICK_MS);
timer.unref();

process.on('message', ({ id, question }) => {
  if (question === 'pollution') process.send({ id, pollution: membersOfEveryObject() });
  if (question !== 'silence') return;
  // The silence that this message has waited through is told, too.
  setTimeout(() => {
    process.send({ id, silence: longest });
    longest = 0;
  }, 2 * TICK_MS);
});

/** What `({})` has that it should not have. */
function membersOfEveryObject() {
  const members = [];
  for (const name in {}) members.push(name);
  return members;
}

/** How long the main thread was ready to run and did not get a processor, ms: the second field of schedstat. */
function waitedMs() {
  try {
    return Number(readFileSync('/proc/self/schedstat', 'latin1').split(' ')[1]) / 1e6;
  } catch {
    return 0; // no Linux: then the whole time counts
  }
}

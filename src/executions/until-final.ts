import { setTimeout as sleep } from 'node:timers/promises';

/** How long a cancellation waits for the worker, which may be another process, to stop; and how often it looks. */
const CANCEL_WAIT_MS = 1000;
const FIRST_POLL_MS = 5;
const LAST_POLL_MS = 100;

/** Asks again and again, until what was cancelled has ended, or does not within a moment. */
export async function untilFinal(hasEnded: () => Promise<boolean>): Promise<void> {
  const giveUp = Date.now() + CANCEL_WAIT_MS;
  for (let delay = FIRST_POLL_MS; Date.now() < giveUp; delay = Math.min(delay * 2, LAST_POLL_MS)) {
    if (await hasEnded()) return;
    await sleep(delay);
  }
}

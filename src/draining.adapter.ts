import type { Server } from 'node:http';
import { ExpressAdapter } from '@nestjs/platform-express';

/** How long answers that are under way may take when the server closes; then their connections are cut. */
const DRAIN_MS = 2000;
/** A connection whose answer is complete is kept for the next request, which will not come any more. */
const IDLE_CHECK_MS = 20;

/** Closes the HTTP server so that streams end as complete responses, while a client that reads nothing can't hold it up. */
export class DrainingAdapter extends ExpressAdapter {
  override async close(): Promise<void> {
    const server: Server = this.getHttpServer();
    const closed = super.close();
    const idle = setInterval(() => server.closeIdleConnections(), IDLE_CHECK_MS);
    const last = setTimeout(() => server.closeAllConnections(), DRAIN_MS);
    await closed;
    clearInterval(idle);
    clearTimeout(last);
  }
}

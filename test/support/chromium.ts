import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import type { Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import { chromium } from 'playwright-core';
import type { Browser, Page } from 'playwright-core';

const EXECUTABLE = '/usr/bin/chromium';
const LIBRARY = new URL('../../node_modules/@microsoft/fetch-event-source/lib/esm/', import.meta.url);

export const hasChromium = existsSync(EXECUTABLE);

/** A page in Chromium on an origin of its own, to which any other server is foreign. */
export class ChromiumPage {
  private constructor(
    private readonly browser: Browser,
    private readonly page: Page,
    private readonly server: Server,
  ) {}

  static async open(): Promise<ChromiumPage> {
    const args = ['--no-sandbox', '--disable-background-networking', '--disable-gpu'];
    const browser = await chromium.launch({ executablePath: EXECUTABLE, args });
    const server = createServer((request, response) => {
      const module = /^\/fetch-event-source\/(\w+)$/.exec(request.url ?? '')?.[1];
      response.setHeader('content-type', module ? 'text/javascript' : 'text/html');
      if (!module) return void response.end('<!doctype html><title>A page of another origin</title>');
      void readFile(new URL(`${module}.js`, LIBRARY)).then((code) => response.end(code));
    });
    server.listen(0, '127.0.0.1');
    await once(server, 'listening');
    const page = await browser.newPage();
    await page.goto(`http://127.0.0.1:${(server.address() as AddressInfo).port}/`);
    return new ChromiumPage(browser, page, server);
  }

  /**
   * Calls a function in the page that uses nothing of its file; `first` is the code of its first argument there, the
   * second one goes there as JSON.
   */
  call<Argument, Result>(
    run: (first: never, argument: Argument) => Promise<Result>,
    first: string,
    argument: Argument,
  ): Promise<Result> {
    const code = `(async () => (${String(run)})(${first}, ${JSON.stringify(argument)}))()`;
    return this.page.evaluate<Result>(code);
  }

  async close(): Promise<void> {
    await this.browser.close();
    this.server.closeAllConnections();
    this.server.close();
    await once(this.server, 'close');
  }
}

/** Code for {@link ChromiumPage.call}: the library, loaded as the page's own. */
export const FETCH_EVENT_SOURCE = `(await import('/fetch-event-source/index')).fetchEventSource`;

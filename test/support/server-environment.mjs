import { TestEnvironment } from 'jest-environment-node';

/** Node's environment, in which a module of the server can be imported by URL from outside of Jest's sandbox. */
export default class ServerEnvironment extends TestEnvironment {
  async setup() {
    await super.setup();
    this.global.importOutside = (url) => import(url);
  }
}

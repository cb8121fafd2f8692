// Agent Studio as several processes on a database of their own.

/** The first process is the one that clients ask; the workers come and go. */
export class StudioProcesses {
  /** @type {{child: import('./processes.mjs').Child, url: string, port: number}[]} */
  workers = [];

  /** @param options.startOne starts a process with a role, `endOne` ends what was started, `database` the last of all */
  constructor({ startOne, endOne, database }) {
    this.startOne = startOne;
    this.endOne = endOne;
    this.database = database;
  }

  /** One process that does all (`workers: 0`), or an api process and so many workers. */
  async start(workers) {
    this.front = await this.startOne(workers === 0 ? 'all' : 'api');
    await this.setWorkers(workers);
    return this;
  }

  /** Starts or ends workers, until there are so many. */
  async setWorkers(count) {
    const missing = Math.max(0, count - this.workers.length);
    this.workers.push(...(await Promise.all(Array.from({ length: missing }, () => this.startOne('worker')))));
    await Promise.all(this.workers.splice(count).map((worker) => this.endOne(worker)));
  }

  /** Kills a worker; the others hear nothing of it. */
  async kill(worker) {
    await worker.child.kill();
    this.workers = this.workers.filter((other) => other !== worker);
  }

  /** The processes that run. */
  get children() {
    return [this.front, ...this.workers].map(({ child }) => child);
  }

  async end() {
    await this.setWorkers(0);
    await this.endOne(this.front);
    await this.endOne(this.database);
  }
}

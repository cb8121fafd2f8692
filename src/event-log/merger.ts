import { Logger } from '@nestjs/common';
import type { Pool } from 'pg';
import { retryWhileUnavailable } from '../database/unavailable.js';
import { FlushSchedule } from './flush-schedule.js';
import type { LogListener, LogSubscriptions } from './log-subscriptions.js';
import { LAST_OF_BATCH } from './merged-order.js';
import type { MergedOrder, NewOrderRow, OrderRow, Range } from './merged-order.js';
import { POSITIONS } from './statements.js';
import { WaitingChunks } from './waiting-chunks.js';

/** Chunks of one member that come one after the other at most, while others have some too. */
const MOST_OF_ONE = 256;
/** Chunks of a row of the order, about. */
const MOST_IN_ROW = 4096;
/** So many rows after which one says how far each member is merged. */
const CHECKPOINT_ROWS = 64;

/** What the members' logs say of the stored order: some were deleted, or they do not go as far as it does. */
export type Look = 'possible' | 'impossible' | 'deleted';

export interface MergerOptions {
  batchId: string;
  /** Logs of the batch itself and of its items. */
  members: string[];
  pool: Pool;
  order: MergedOrder;
  append: (row: NewOrderRow) => Promise<boolean>;
  /** Where it hears of its members. */
  subscriptions: LogSubscriptions;
  /** Whom it tells, under the id of the batch. */
  readers: LogSubscriptions;
  /** Between two rows of the order, in ms. */
  intervalMs: number;
  /** Called when it can't go on: logs or rows of the order are gone, the process shuts down, or there is a defect. */
  onFailure: () => void;
}

/**
 * Puts what the members of one batch have logged into one order, as long as somebody in this process reads it. Other
 * processes may do the same at the same time.
 */
export class Merger {
  private readonly logger = new Logger(Merger.name);
  private readonly stopped = new AbortController();
  private readonly rounds: FlushSchedule;
  private readonly listeners: LogListener[];
  /** How far each member's log is known to go, and how far it is merged. */
  private readonly known: number[];
  private readonly merged: number[];
  /** Members with chunks that are not merged yet, in the order in which they came. */
  private readonly due = new Set<number>();
  private readonly waiting = new WaitingChunks();
  private position = 0;
  private rowsSinceCheckpoint = 0;
  private lastRound = -Infinity;
  private hasBegun = false;
  /** The members' logs must be asked how far they go. */
  private mustLook = true;
  /** A look at all members at once found the batch's end: nothing of them is missing. */
  private sawAll = false;

  constructor(private readonly options: MergerOptions) {
    const { members } = options;
    this.known = members.map(() => 0);
    this.merged = members.map(() => 0);
    this.rounds = new FlushSchedule(() => this.round());
    this.listeners = members.map((_id, member) => this.listenerOf(member));
  }

  /** Begins where the stored order ends. Reads what the logs have, too, and does not begin if the order does not go with them. */
  async start(): Promise<Look> {
    const { merged, position, rows } = await this.options.order.newest();
    merged?.forEach((last, member) => (this.merged[member] = last));
    this.position = position;
    this.apply(rows);
    this.stopped.signal.throwIfAborted();
    const { subscriptions, members } = this.options;
    // Of one that has ended there is one thing to hear still: that it was deleted.
    const heard = this.hasEnded ? this.listeners.slice(0, 1) : this.listeners;
    heard.forEach((listener, member) => subscriptions.listen(members[member] ?? '', listener));
    const found = await this.look();
    this.hasBegun = found === 'possible';
    this.request();
    return found;
  }

  /** The last position that it knows of. */
  get last(): number {
    return this.position;
  }

  stop(): void {
    this.stopped.abort(new Error('Nobody reads the batch any more.'));
    const { subscriptions, members } = this.options;
    this.listeners.forEach((listener, member) => subscriptions.unlisten(members[member] ?? '', listener));
  }

  private get hasEnded(): boolean {
    return this.merged[0] === LAST_OF_BATCH;
  }

  private listenerOf(member: number): LogListener {
    return {
      deliver: (batch, characters) => {
        if (batch.last > (this.merged[member] ?? 0)) this.waiting.keep(member, batch, characters);
        this.learn(member, batch.last);
      },
      announce: (last) => this.learn(member, last),
      invalidate: () => {
        this.mustLook = true;
        this.request();
      },
      close: this.options.onFailure,
    };
  }

  private learn(member: number, last: number): void {
    if (last <= (this.known[member] ?? 0)) return;
    this.known[member] = last;
    if (last <= (this.merged[member] ?? 0)) return;
    this.due.add(member);
    this.request();
  }

  private forget(member: number): void {
    this.known[member] = 0;
    this.due.delete(member);
  }

  private request(): void {
    if (this.hasBegun && !this.stopped.signal.aborted)
      this.rounds.request(this.lastRound + this.options.intervalMs - performance.now());
  }

  /** Merges what is due. It never rejects: who reads is sent away if it can't go on. */
  private async round(): Promise<void> {
    if (this.stopped.signal.aborted || this.hasEnded) return;
    this.lastRound = performance.now();
    try {
      await retryWhileUnavailable(() => this.merge(), {
        signal: this.stopped.signal,
        onRetry: (error) => {
          this.logger.debug(error);
          this.mustLook = true; // if it crashed, what was heard of may be lost
        },
      });
    } catch (error) {
      if (this.stopped.signal.aborted) return;
      this.logger.error(error);
      this.options.onFailure();
    }
  }

  private async merge(): Promise<void> {
    const isEnding = (this.known[0] ?? 0) >= LAST_OF_BATCH && !this.sawAll;
    if ((this.mustLook || isEnding) && (await this.look()) !== 'possible') return this.options.onFailure();
    const row = this.compose();
    if (!row) return;
    const { order, append, readers, batchId, members } = this.options;
    const { cuts } = order;
    const isCheckpoint = this.rowsSinceCheckpoint + 1 >= CHECKPOINT_ROWS;
    const merged = isCheckpoint ? this.mergedWith(row) : undefined;
    const isFirst = await append({ ...row, batchId, members, merged, cuts, signal: this.stopped.signal });
    if (this.stopped.signal.aborted) return;
    const chunks = isFirst ? this.waiting.find(row.ranges) : undefined;
    const rows = isFirst ? [row] : await order.after(this.position);
    if (!rows) return this.options.onFailure(); // it was cut: begin anew
    if (rows.length === 0) return this.refused();
    this.apply(rows);
    if (isFirst && isCheckpoint) this.rowsSinceCheckpoint = 0;
    if (chunks) {
      const { first_position: first, last_position: last } = row;
      const characters = chunks.reduce((sum, chunk) => sum + chunk.length, 0);
      readers.deliver(batchId, { first, last, chunks, terminal: this.hasEnded }, characters);
    } else {
      readers.announce(batchId, this.position);
    }
    if (this.due.size > 0) this.request();
  }

  /** Nobody has taken the position, and the row was not appended all the same. */
  private async refused(): Promise<void> {
    const { order, onFailure } = this.options;
    const { position, cuts } = await order.end();
    // A crash of PostgreSQL took back what was stored, or somebody cut it: begin anew.
    if (position < this.position || cuts !== order.cuts) return onFailure();
    // What was heard of the logs was wrong.
    this.mustLook = true;
    this.request();
  }

  /** Asks the table how far the members' logs go. */
  private async look(): Promise<Look> {
    const { pool, members, batchId } = this.options;
    this.mustLook = false;
    const before = [...this.known];
    const { rows } = await pool.query<{ execution_id: string; last_sequence: number }>({
      ...POSITIONS,
      values: [members],
    });
    // Each log has had a chunk since its acceptance.
    if (rows.length < members.length) return 'deleted';
    const found = new Map(rows.map((row) => [row.execution_id, row.last_sequence]));
    members.forEach((executionId, member) => {
      // What was heard of before may be lost; what was heard of meanwhile is not.
      if (this.known[member] === before[member]) this.forget(member);
      this.learn(member, found.get(executionId) ?? 0);
    });
    // All items have ended before the batch does, so the same look saw all of them.
    this.sawAll = found.get(batchId) === LAST_OF_BATCH;
    const isPossible = members.every((id, member) => (found.get(id) ?? 0) >= (this.merged[member] ?? 0));
    return isPossible ? 'possible' : 'impossible';
  }

  /** The next row: a piece of each member that is due, behind the batch's first chunk. Its last one comes when nothing else is left. */
  private compose(): OrderRow | undefined {
    const ranges: Range[] = this.merged[0] === 0 ? [{ member: 0, first: 1, last: 1 }] : [];
    let total = ranges.length;
    for (const member of this.due) {
      if (member === 0) continue;
      const first = (this.merged[member] ?? 0) + 1;
      const last = Math.min(this.known[member] ?? 0, first + MOST_OF_ONE - 1);
      ranges.push({ member, first, last });
      total += last - first + 1;
      if (total >= MOST_IN_ROW) break;
    }
    if (total === 0 && this.sawAll) {
      ranges.push({ member: 0, first: LAST_OF_BATCH, last: LAST_OF_BATCH });
      total = 1;
    }
    if (total === 0) return undefined;
    return { first_position: this.position + 1, last_position: this.position + total, ranges };
  }

  private mergedWith({ ranges }: OrderRow): number[] {
    const merged = [...this.merged];
    for (const { member, last } of ranges) merged[member] = last;
    return merged;
  }

  /** Takes over rows of the stored order that follow the position. */
  private apply(rows: OrderRow[]): void {
    for (const { last_position, ranges } of rows) {
      this.position = last_position;
      this.rowsSinceCheckpoint++;
      for (const { member, last } of ranges) {
        this.merged[member] = last;
        this.waiting.drop(member, last);
        this.due.delete(member);
        // Behind all others that wait.
        if ((this.known[member] ?? 0) > last) this.due.add(member);
      }
    }
  }
}

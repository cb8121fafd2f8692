import { AppError } from '../errors.js';
import { OneByOne } from '../one-by-one.js';
import type { HeldOutput } from './output-memory.js';
import { EvaluationLimitError, MAX_EVALUATION_CHARS, type EvaluationLimit } from './bounds.js';

/** A template to be rendered, and what it reads: JSON where it is no text, absent where it does not name it. */
export interface TemplateTask {
  kind: 'template';
  source: string;
  query?: string;
  variables?: string;
  chat_history?: string;
  outputs?: Record<string, string>;
  errors?: Record<string, unknown>;
}

/** A condition to be evaluated. */
export interface ConditionTask {
  kind: 'condition';
  source: string;
  /** Whether it was accepted when regular expressions were those of JavaScript. */
  stored: boolean;
  query?: string;
  output?: string;
  variables?: string;
}

export type EvaluationTask = TemplateTask | ConditionTask;

/** The text of a template, or whether a condition holds; or why there is none, in words for a client. */
export type EvaluationResult = { value: string | boolean } | { failure: string; limit?: EvaluationLimit };

/** A result, and the time that it took in its thread, in ms. */
export type Evaluated = EvaluationResult & { took_ms: number };

/** Who waits for a thread: those that have taken least come first. */
export interface Turn {
  /** What the execution's evaluations took so far, ms. */
  spent_ms: number;
  /** Ends the waiting at once; the promise rejects. */
  signal: AbortSignal;
}

/** Evaluates templates and conditions in threads, so that none of them stops the event loop, and each can be ended. */
export abstract class Evaluator {
  /** What the evaluations of one execution may take together, in ms of their threads. */
  abstract readonly budget_ms: number;

  /** Calls `make` when a thread is free. Rejects when `signal` aborts, with what `make` throws, or when it was closed. */
  abstract run(make: () => EvaluationTask, turn: Turn): Promise<Evaluated>;

  /** As `Turns.wait`, for what is evaluated on the event loop itself. */
  abstract turn(): Promise<void> | undefined;

  /** Counts an evaluation on the event loop. */
  abstract countInline(): void;
}

/** UTF-16 code units of the texts that the agents of one execution hold at once, about: what is made in one turn may come on top. */
const MOST_HELD = 10_000_000;

/** A text that was made and is kept in mind until `letGo`. */
export interface MadeText {
  text: string;
  letGo: () => void;
}

/** The evaluations of one execution: one at a time in a thread, all of them within one budget. */
export class Evaluations {
  private spent_ms = 0;
  private readonly turns = new OneByOne();
  private held = 0;
  /** Who waits for room. */
  private waiting: (() => void)[] = [];

  constructor(
    private readonly evaluator: Evaluator,
    private readonly signal: AbortSignal,
    private readonly output: HeldOutput,
  ) {}

  turn(): Promise<void> | undefined {
    return this.evaluator.turn();
  }

  /**
   * Waits until the run, and all runs of the process, hold so little that there is room for a text of this length, and keeps it in
   * mind from then on. Resolves with what lets go of it; rejects when the run is stopped.
   *
   * @param length in UTF-16 code units
   */
  async take(length: number): Promise<() => void> {
    // Many ask in one turn: each has to see what the ones before it took.
    while (this.held >= MOST_HELD) await this.whileFull();
    this.held += length;
    try {
      await this.output.take(length, this.signal);
    } catch (error) {
      this.letGo(length);
      throw error;
    }
    return () => {
      this.output.remove(length);
      this.letGo(length);
    };
  }

  countInline(): void {
    this.evaluator.countInline();
  }

  /**
   * Rejects with `AppError` `evaluation_limit` when the budget is used up, with {@link EvaluationLimitError} or an `Error`
   * in words for a client when the evaluation fails.
   */
  inThread(make: () => EvaluationTask): Promise<string | boolean> {
    return this.turns.run(() => this.evaluate(make));
  }

  /**
   * The same for a text, which waits for room; what needs none has its turn meanwhile. How long it is shows once it was made: if all
   * runs hold too much for that, it is not kept, and made again when there is room for it.
   */
  async textInThread(make: () => EvaluationTask): Promise<MadeText> {
    for (;;) {
      while (this.held >= MOST_HELD) await this.whileFull();
      const made = await this.turns.run(async () =>
        this.held < MOST_HELD ? this.evaluate(make) : undefined,
      );
      if (made === undefined) continue;
      const text = String(made);
      if (!this.output.hasRoom(text.length)) return this.makeAgain(make, text.length);
      return { text, letGo: await this.take(text.length) };
    }
  }

  private async makeAgain(make: () => EvaluationTask, length: number): Promise<MadeText> {
    const letGo = await this.take(length);
    try {
      const { value } = valueOf(await this.turns.run(() => this.perform(make)));
      return { text: String(value), letGo };
    } catch (error) {
      letGo();
      throw error;
    }
  }

  private async evaluate(make: () => EvaluationTask): Promise<string | boolean> {
    const { spent_ms, evaluator } = this;
    if (spent_ms >= evaluator.budget_ms) {
      throw new AppError(
        'evaluation_limit',
        `The templates and conditions of this execution took ${Math.round(spent_ms)} ms together; they may take ${evaluator.budget_ms} ms.`,
      );
    }
    const evaluated = await this.perform(make);
    this.spent_ms += evaluated.took_ms;
    return valueOf(evaluated).value;
  }

  /** Outside of the budget. */
  private perform(make: () => EvaluationTask): Promise<Evaluated> {
    const { spent_ms, signal, evaluator } = this;
    return evaluator.run(make, { spent_ms, signal });
  }

  /** Resolves when the run itself holds less. */
  private whileFull(): Promise<void> {
    return new Promise((resolve) => this.waiting.push(resolve));
  }

  private letGo(length: number): void {
    this.held -= length;
    for (const goOn of this.waiting.splice(0)) goOn();
  }
}

/** Throws what a failed evaluation is to be told by. */
function valueOf(evaluated: EvaluationResult): { value: string | boolean } {
  if ('value' in evaluated) return evaluated;
  if (evaluated.limit === undefined) throw new Error(evaluated.failure);
  throw new EvaluationLimitError(evaluated.failure, evaluated.limit);
}

const texts = new WeakMap<object, string>();

/** The JSON of a value that does not change; made once, since many evaluations of a run read the same. */
export function jsonOf(value: object): string {
  const known = texts.get(value);
  if (known !== undefined) return known;
  const text = JSON.stringify(value);
  texts.set(value, text);
  return text;
}

/** Throws {@link EvaluationLimitError} if what an evaluation reads is longer than 20,000,000 characters. */
export function refuseLongInput(read: readonly (string | undefined)[]): void {
  const length = read.reduce((sum, text) => sum + (text?.length ?? 0), 0);
  if (length <= MAX_EVALUATION_CHARS) return;
  throw new EvaluationLimitError(`what it reads is longer than ${MAX_EVALUATION_CHARS} characters`, 'size');
}

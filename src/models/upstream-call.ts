import { TransientError } from '../errors.js';
import { toModelError } from './model-error.js';

/**
 * Watches over one call of an upstream: closes its socket when the caller aborts or when the upstream has been silent
 * for `timeoutMs` while somebody waited for it. {@link end} must be called on every path.
 *
 * One timer serves the whole call and is set anew only when it fires, since a call may wait thousands of times.
 */
export class UpstreamCall {
  private readonly connection = new AbortController();
  private timer: NodeJS.Timeout;
  private lastLook: NodeJS.Immediate | undefined;
  private waitingSince: number | undefined;
  private silent = false;

  constructor(
    private readonly provider: string,
    private readonly timeoutMs: number,
    private readonly caller: AbortSignal,
  ) {
    caller.throwIfAborted();
    caller.addEventListener('abort', this.close, { once: true });
    this.timer = setTimeout(this.check, timeoutMs);
  }

  /** Closes the socket when it aborts; to be given to the provider. */
  get signal(): AbortSignal {
    return this.connection.signal;
  }

  /** From now on the upstream's silence counts. */
  listen(): void {
    this.waitingSince = performance.now();
  }

  /** The upstream has given a sign of life. Throws if it came too late, since what was received before may still come. */
  heard(): void {
    this.waitingSince = undefined;
    this.connection.signal.throwIfAborted();
  }

  readonly close = (): void => {
    // Without a reason: the AI SDK takes any reason but an AbortError for a failure of the upstream.
    this.connection.abort();
  };

  /** Frees what the watch holds; the socket of an unfinished call is closed. */
  end(finished: boolean): void {
    clearTimeout(this.timer);
    clearImmediate(this.lastLook);
    this.caller.removeEventListener('abort', this.close);
    if (!finished) this.close();
  }

  /** What to throw for the error that a call ended with: the caller's reason, the time-out, or the upstream's fault. */
  toError(error: unknown): unknown {
    if (this.caller.aborted) return this.caller.reason;
    if (!this.silent) return toModelError(error, this.provider);
    return new TransientError(
      'timeout',
      `The model provider "${this.provider}" sent nothing for ${this.timeoutMs} ms, which is its timeout_ms.`,
      { cause: error },
    );
  }

  private readonly check = (): void => {
    const silence = this.waitingSince === undefined ? 0 : performance.now() - this.waitingSince;
    if (silence < this.timeoutMs) this.timer = setTimeout(this.check, this.timeoutMs - silence);
    // When this process itself was held up, what the upstream said is unread, and the event loop reads it before this.
    else this.lastLook = setImmediate(this.expire, this.waitingSince);
  };

  private readonly expire = (since: number | undefined): void => {
    if (this.waitingSince !== since) return this.check();

    this.silent = true;
    this.close();
  };
}

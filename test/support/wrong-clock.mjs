/**
 * Preloaded (`--import`): the process's clock on the wall is wrong by an hour, ahead where its port is odd and behind where it is
 * even. The monotonic clock and timers are not touched, as with a machine whose time was never set.
 */
const HOUR_MS = 3_600_000;
const shift = Number(process.env.PORT) % 2 === 1 ? HOUR_MS : -HOUR_MS;
const RealDate = Date;
const now = () => RealDate.now() + shift;

globalThis.Date = class extends RealDate {
  constructor(...args) {
    if (args.length === 0) super(now());
    else super(...args);
  }

  static now() {
    return now();
  }
};

/**
 * The advisory locks of the server (PostgreSQL, section 13.3.5), one number each, which no other program on the same
 * database may use. A number never changes: processes of two builds must exclude each other during an upgrade.
 */
export const LOCKS = {
  /** Held while the schema is brought up to date. */
  migration: 7_061_923_418,
  /** Gives sequences to changes of status. */
  sequence: 7_061_923_419,
  /** Admits executions of deployments with a limit: whoever counts has to see what the one before admitted. */
  admission: 7_061_923_420,
  /** Carries batches on: whoever counts has to see what the one before let go. */
  batch: 7_061_923_421,
  /** Makes the example, once. */
  seed: 7_061_923_422,
  /** Adds ends of executions to counters and statistics, each once. */
  counters: 7_061_923_423,
} as const;

export type AdvisoryLock = (typeof LOCKS)[keyof typeof LOCKS];

import { InitialSchema1795393371531 } from './1795393371531-InitialSchema.js';
import { IdempotencyKey1795409219638 } from './1795409219638-IdempotencyKey.js';
import { Subscribers1795409778820 } from './1795409778820-Subscribers.js';
import { StatusEvents1795410971064 } from './1795410971064-StatusEvents.js';
import { LogRetention1795411603992 } from './1795411603992-LogRetention.js';

/** Every migration, oldest first. They only go forward. */
export const migrations = [
  InitialSchema1795393371531,
  IdempotencyKey1795409219638,
  Subscribers1795409778820,
  StatusEvents1795410971064,
  LogRetention1795411603992,
];

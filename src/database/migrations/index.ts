import { InitialSchema1795393371531 } from './1795393371531-InitialSchema.js';
import { IdempotencyKey1795409219638 } from './1795409219638-IdempotencyKey.js';
import { StatusEvents1795410971064 } from './1795410971064-StatusEvents.js';
import { LogRetention1795411603992 } from './1795411603992-LogRetention.js';
import { Subscribers1795415875837 } from './1795415875837-Subscribers.js';
import { Recovery1795611915650 } from './1795611915650-Recovery.js';
import { Batches1795631175840 } from './1795631175840-Batches.js';
import { Counters1795821098661 } from './1795821098661-Counters.js';
import { WorkerLeases1795821330017 } from './1795821330017-WorkerLeases.js';
import { OrderCuts1795836000000 } from './1795836000000-OrderCuts.js';

/** Every migration, oldest first. They only go forward. */
export const migrations = [
  InitialSchema1795393371531,
  IdempotencyKey1795409219638,
  StatusEvents1795410971064,
  LogRetention1795411603992,
  Subscribers1795415875837,
  Recovery1795611915650,
  Batches1795631175840,
  Counters1795821098661,
  WorkerLeases1795821330017,
  OrderCuts1795836000000,
];

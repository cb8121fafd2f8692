import { InitialSchema1795393371531 } from './1795393371531-InitialSchema.js';

/** Every migration, oldest first. They only go forward. */
export const migrations = [InitialSchema1795393371531];

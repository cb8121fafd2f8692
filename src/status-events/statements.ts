import { countedDeployment } from '../database/counted-deployment.js';
import { SNAPSHOT_EXECUTIONS } from './status-event.js';

/** Changes that one statement numbers: some 0.1 s of work, for which all others who number wait. */
export const NUMBERED_AT_ONCE = 10_000;
import { IS_QUEUED, IS_RUNNING, IS_UNFINISHED } from '../executions/status.js';

/**
 * Gives a sequence to the changes that are committed and have none. Ids are given before a commit, so a reader that went
 * by them would pass over a change whose commit took longer than that of a later one; sequences are given after it, by
 * one transaction at a time, so whoever sees one sees all before it. The oldest {@link NUMBERED_AT_ONCE} at most. In a transaction under the lock `sequence`.
 */
const NUMBER = `
  pending AS MATERIALIZED (
    SELECT event_id, nextval(pg_get_serial_sequence('status_event', 'event_id')) AS sequence
      FROM (SELECT event_id FROM status_event WHERE sequence IS NULL
             ORDER BY event_id LIMIT ${NUMBERED_AT_ONCE}) AS oldest_first
  ), numbered AS (
    UPDATE status_event SET sequence = pending.sequence FROM pending WHERE status_event.event_id = pending.event_id
    RETURNING pending.sequence
  )`;

/** How far the numbered changes go. */
const HEAD = `coalesce((SELECT max(sequence) FROM numbered), (SELECT max(sequence) FROM status_event), 0)`;

/** How many were numbered: as many as one statement may, if there may be more. */
const NUMBERED = `(SELECT count(*)::int FROM numbered)`;

export const NUMBER_PENDING = `WITH ${NUMBER} SELECT ${HEAD} AS head, ${NUMBERED} AS numbered`;

/** Whether there is something to number, and how far the numbered ones go. */
export const LOOK = {
  name: 'status-event-look',
  text: `
    SELECT EXISTS (SELECT 1 FROM status_event WHERE sequence IS NULL) AS pending,
           coalesce((SELECT max(sequence) FROM status_event), 0) AS head`,
};

/** $1 to $4: the filter; a parameter that is null does not filter. */
const OF_EXECUTION = `
  ($1::text IS NULL OR deployment_name = $1) AND ($2::text IS NULL OR environment = $2)
  AND ($3::uuid IS NULL OR workflow_id = $3) AND ($4::text[] IS NULL OR status = ANY ($4))`;
const OF_DEPLOYMENT = `
  ($1::text IS NULL OR deployment_name = $1) AND ($2::text IS NULL OR environment = $2)
  AND ($3::uuid IS NULL OR workflow_id = $3)`;

/**
 * The numbering and the state in one statement, which sees one moment of both: a change that the state shows is not
 * told again. That holds if it numbered all there was. $5: with deployments. Under the lock `sequence`.
 */
export const SNAPSHOT = `
  WITH ${NUMBER}, unfinished AS MATERIALIZED (
    SELECT execution_id, deployment_id, deployment_name, environment, workflow_id, status, attempt AS attempts,
           created_at, started_at
      FROM execution WHERE status ${IS_UNFINISHED} AND ${OF_EXECUTION}
  )
  SELECT ${HEAD} AS sequence, ${NUMBERED} AS numbered,
         now() AS timestamp,
         (SELECT count(*) FROM unfinished WHERE status ${IS_QUEUED}) AS queued,
         (SELECT count(*) FROM unfinished WHERE status ${IS_RUNNING}) AS running,
         (SELECT coalesce(json_agg(newest), '[]')
            FROM (SELECT * FROM unfinished ORDER BY execution_id DESC LIMIT ${SNAPSHOT_EXECUTIONS}) AS newest) AS executions,
         CASE WHEN $5::boolean THEN
           (SELECT coalesce(json_agg(found), '[]')
              FROM (SELECT deployment_id, deployment_name, environment, workflow_id, status, execution_count, success_count,
                           error_count, cancelled_count, last_executed_at
                      FROM ${countedDeployment()} AS deployment WHERE ${OF_DEPLOYMENT} ORDER BY deployment_id) AS found)
         END AS deployments`;

/** Changes after a sequence ($6) and up to another one ($7), $8 at most. */
export const READ = {
  name: 'status-event-read',
  text: `
    SELECT sequence, deployment_id, deployment_name, environment, workflow_id, execution_id, status, attempts, code,
           created_at
      FROM status_event
     WHERE sequence > $6 AND sequence <= $7
       AND CASE WHEN execution_id IS NULL THEN $5::boolean AND ${OF_DEPLOYMENT} ELSE ${OF_EXECUTION} END
     ORDER BY sequence LIMIT $8`,
};

/** Whether a client can go on after a sequence: it is 0 or kept. */
export const IS_KEPT = {
  name: 'status-event-is-kept',
  text: 'SELECT 1 FROM status_event WHERE sequence = $1',
};

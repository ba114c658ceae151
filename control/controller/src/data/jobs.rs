//! Jobs, as the scheduler reports them.

use std::collections::BTreeMap;

use deadpool_postgres::GenericClient;
use flynn_api::controller::{Job, JobState};
use flynn_api::{Error, Result};
use tokio_postgres::Row;
use tokio_postgres::types::Json;
use uuid::Uuid;

use super::{LIST_LIMIT, get, id, json, of_word, one, only, rows, run, word};

const COLUMNS: &str = "uuid, host_id, app_id, release_id, process_type, state::text AS state, args, meta,
    exit_status, host_error, run_at, restarts, created_at, updated_at";

fn read(row: &Row) -> Result<Job> {
    let uuid = id(row, "uuid")?;
    let host_id: String = get(row, "host_id")?;
    Ok(Job {
        id: if host_id.is_empty() {
            String::new()
        } else {
            format!("{host_id}-{uuid}")
        },
        uuid,
        host_id,
        app_id: id(row, "app_id")?,
        release_id: id(row, "release_id")?,
        process_type: get(row, "process_type")?,
        state: of_word(get(row, "state")?)?,
        args: json(row, "args")?,
        meta: json(row, "meta")?,
        exit_status: get(row, "exit_status")?,
        host_error: get(row, "host_error")?,
        run_at: get(row, "run_at")?,
        restarts: get(row, "restarts")?,
        created_at: get(row, "created_at")?,
        updated_at: get(row, "updated_at")?,
    })
}

/// The job with this UUID, whichever host it is on.
pub(crate) async fn find(c: &impl GenericClient, uuid: Uuid) -> Result<Option<Job>> {
    let sql = format!("SELECT {COLUMNS} FROM jobs WHERE uuid = $1");
    one(c, &sql, &[&uuid]).await?.as_ref().map(read).transpose()
}

/// An app's newest jobs.
pub(crate) async fn of_app(c: &impl GenericClient, app: Uuid) -> Result<Vec<Job>> {
    let sql = format!(
        "SELECT {COLUMNS} FROM jobs WHERE app_id = $1 ORDER BY created_at DESC, uuid LIMIT {LIST_LIMIT}"
    );
    rows(c, &sql, &[&app]).await?.iter().map(read).collect()
}

/// All jobs that are not down.
pub(crate) async fn active(c: &impl GenericClient) -> Result<Vec<Job>> {
    let sql = format!("SELECT {COLUMNS} FROM jobs WHERE state <> 'down' ORDER BY created_at DESC, uuid");
    rows(c, &sql, &[]).await?.iter().map(read).collect()
}

/// Writes what is known of a job now. The database refuses states that go backward, unless the job was restarted since.
/// A life that begins anew has no end yet.
pub(crate) async fn put(c: &impl GenericClient, app: Uuid, release: Uuid, job: &Job) -> Result<Job> {
    let uuid = Uuid::try_parse(&job.uuid).map_err(|_| Error::invalid_field("uuid", "must be a UUID"))?;
    let sql = format!(
        "INSERT INTO jobs AS j (uuid, host_id, app_id, release_id, process_type, state, args, meta, exit_status,
            host_error, run_at, restarts)
         VALUES ($1, $2, $3, $4, $5, $6::text::job_state, $7, $8, $9, $10, $11, $12)
         ON CONFLICT (uuid) DO UPDATE SET host_id = coalesce(nullif(excluded.host_id, ''), j.host_id),
            state = excluded.state,
            exit_status = coalesce(excluded.exit_status, CASE WHEN excluded.state >= j.state THEN j.exit_status END),
            host_error = coalesce(excluded.host_error, CASE WHEN excluded.state >= j.state THEN j.host_error END),
            run_at = excluded.run_at,
            restarts = coalesce(excluded.restarts, j.restarts), updated_at = now()
         RETURNING {COLUMNS}"
    );
    let state = word(&job.state)?;
    let params: super::Params<'_> = &[
        &uuid,
        &job.host_id,
        &app,
        &release,
        &job.process_type,
        &state,
        &Json(&job.args),
        &Json(&job.meta),
        &job.exit_status,
        &job.host_error,
        &job.run_at,
        &job.restarts,
    ];
    read(&only(c, &sql, params).await?)
}

/// How many jobs of each process type are in which state, those that are down apart.
pub(crate) type Counts = BTreeMap<(String, JobState), u32>;

/// Counts a release's jobs that are not down.
pub(crate) async fn count(c: &impl GenericClient, app: Uuid, release: Uuid) -> Result<Counts> {
    let sql = "SELECT process_type, state::text AS state, count(*) AS n FROM jobs
               WHERE app_id = $1 AND release_id = $2 AND state <> 'down' GROUP BY 1, 2";
    let read = |row: &Row| {
        let n: i64 = get(row, "n")?;
        Ok((
            (get(row, "process_type")?, of_word(get(row, "state")?)?),
            u32::try_from(n).unwrap_or(u32::MAX),
        ))
    };
    rows(c, sql, &[&app, &release]).await?.iter().map(read).collect()
}

/// The newest jobs of a release's processes that came up and went down since a deployment began; at most `limit`.
pub(crate) async fn down_since(
    c: &impl GenericClient,
    app: Uuid,
    release: Uuid,
    deployment: Uuid,
    limit: i64,
) -> Result<Vec<Job>> {
    let sql = format!(
        "SELECT {COLUMNS} FROM jobs WHERE app_id = $1 AND release_id = $2 AND state = 'down' AND process_type <> ''
         AND created_at >= (SELECT created_at FROM deployments WHERE id = $3)
         ORDER BY updated_at DESC LIMIT $4"
    );
    rows(c, &sql, &[&app, &release, &deployment, &limit])
        .await?
        .iter()
        .map(read)
        .collect()
}

/// Forgets jobs that have been down for an hour, except each app's newest `kept`.
pub(crate) async fn prune(c: &impl GenericClient, kept: i64) -> Result<u64> {
    let sql = "DELETE FROM jobs WHERE state = 'down' AND updated_at < now() - interval '1 hour' AND uuid IN
        (SELECT uuid FROM (SELECT uuid, row_number() OVER (PARTITION BY app_id ORDER BY created_at DESC) AS n
                           FROM jobs) AS ranked WHERE n > $1)";
    run(c, sql, &[&kept]).await
}

/// Ends an app's jobs that never got a host.
pub(crate) async fn drop_unplaced(c: &impl GenericClient, app: Uuid) -> Result<u64> {
    let sql = "UPDATE jobs SET state = 'down', updated_at = now()
               WHERE app_id = $1 AND host_id = '' AND state <> 'down'";
    run(c, sql, &[&app]).await
}

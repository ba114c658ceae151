//! Scale requests: the way from one formation to the next, as people follow it.

use deadpool_postgres::GenericClient;
use flynn_api::Result;
use flynn_api::controller::{Formation, ScaleRequest};
use tokio_postgres::Row;
use tokio_postgres::types::Json;
use uuid::Uuid;

use super::{get, id, json, only, rows};

const COLUMNS: &str =
    "id, app_id, release_id, state, old_processes, new_processes, old_tags, new_tags, created_at";

fn read(row: &Row) -> Result<ScaleRequest> {
    Ok(ScaleRequest {
        id: id(row, "id")?,
        app_id: id(row, "app_id")?,
        release_id: id(row, "release_id")?,
        state: get(row, "state")?,
        old_processes: json(row, "old_processes")?,
        new_processes: Some(json(row, "new_processes")?),
        old_tags: json(row, "old_tags")?,
        new_tags: Some(json(row, "new_tags")?),
        created_at: get(row, "created_at")?,
    })
}

/// Adds one, pending.
pub(crate) async fn add(
    c: &impl GenericClient,
    app: Uuid,
    release: Uuid,
    old: &Formation,
    new: &Formation,
) -> Result<ScaleRequest> {
    let sql = format!(
        "INSERT INTO scale_requests (id, app_id, release_id, state, old_processes, new_processes, old_tags, new_tags)
         VALUES ($1, $2, $3, 'pending', $4, $5, $6, $7) RETURNING {COLUMNS}"
    );
    let (old_processes, new_processes) = (Json(&old.processes), Json(&new.processes));
    let (old_tags, new_tags) = (Json(&old.tags), Json(&new.tags));
    let params: super::Params<'_> = &[
        &Uuid::new_v4(),
        &app,
        &release,
        &old_processes,
        &new_processes,
        &old_tags,
        &new_tags,
    ];
    read(&only(c, &sql, params).await?)
}

/// Cancels the pending request of a formation, if there is one.
pub(crate) async fn cancel(c: &impl GenericClient, app: Uuid, release: Uuid) -> Result<Vec<ScaleRequest>> {
    let sql = format!(
        "UPDATE scale_requests SET state = 'cancelled', updated_at = now()
         WHERE app_id = $1 AND release_id = $2 AND state = 'pending' RETURNING {COLUMNS}"
    );
    rows(c, &sql, &[&app, &release]).await?.iter().map(read).collect()
}

/// The apps with pending requests.
pub(crate) async fn pending_apps(c: &impl GenericClient) -> Result<Vec<Uuid>> {
    let sql = "SELECT DISTINCT app_id FROM scale_requests WHERE state = 'pending'";
    rows(c, sql, &[])
        .await?
        .iter()
        .map(|row| get(row, "app_id"))
        .collect()
}

/// An app's pending requests, for this transaction alone; those that another one holds are left out.
pub(crate) async fn claim(c: &impl GenericClient, app: Uuid) -> Result<Vec<ScaleRequest>> {
    let sql = format!(
        "SELECT {COLUMNS} FROM scale_requests WHERE app_id = $1 AND state = 'pending' FOR UPDATE SKIP LOCKED"
    );
    rows(c, &sql, &[&app]).await?.iter().map(read).collect()
}

/// A request is fulfilled.
pub(crate) async fn complete(c: &impl GenericClient, request: &str) -> Result<ScaleRequest> {
    let key = super::id_of("scale request", request)?;
    let sql = format!(
        "UPDATE scale_requests SET state = 'complete', updated_at = now() WHERE id = $1 RETURNING {COLUMNS}"
    );
    read(&only(c, &sql, &[&key]).await?)
}

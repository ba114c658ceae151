//! Deployments.

use std::time::Duration;

use deadpool_postgres::GenericClient;
use flynn_api::controller::{Deployment, Processes, Tags};
use flynn_api::{Error, Result};
use tokio_postgres::Row;
use tokio_postgres::types::Json;
use uuid::Uuid;

use super::{LIST_LIMIT, get, id, id_of, json, of_word, one, only, optional_id, rows, run, word};
use crate::deploy::planner::Step;

const COLUMNS: &str = "id, app_id, old_release_id, new_release_id, strategy, status, processes, tags,
    deploy_timeout, error, created_at, finished_at, step,
    extract(epoch FROM now() - step_started_at)::float8 AS step_age";

fn read(row: &Row) -> Result<Deployment> {
    Ok(Deployment {
        id: id(row, "id")?,
        app_id: id(row, "app_id")?,
        old_release_id: optional_id(row, "old_release_id")?,
        new_release_id: id(row, "new_release_id")?,
        strategy: get(row, "strategy")?,
        status: get(row, "status")?,
        processes: json(row, "processes")?,
        tags: json(row, "tags")?,
        deploy_timeout: get(row, "deploy_timeout")?,
        error: get(row, "error")?,
        created_at: get(row, "created_at")?,
        finished_at: get(row, "finished_at")?,
    })
}

/// A deployment under way.
pub(crate) struct Unfinished {
    pub(crate) id: Uuid,
    pub(crate) app: Uuid,
    pub(crate) old_release: Option<Uuid>,
    pub(crate) new_release: Uuid,
    pub(crate) deployment: Deployment,
    pub(crate) step: Step,
    pub(crate) step_age: Duration,
}

fn unfinished(row: &Row) -> Result<Unfinished> {
    Ok(Unfinished {
        id: get(row, "id")?,
        app: get(row, "app_id")?,
        old_release: get(row, "old_release_id")?,
        new_release: get(row, "new_release_id")?,
        deployment: read(row)?,
        step: of_word(get(row, "step")?)?,
        step_age: Duration::try_from_secs_f64(get(row, "step_age")?).unwrap_or_default(),
    })
}

/// A deployment to be.
#[expect(
    clippy::struct_field_names,
    reason = "`new_release` is the field's name everywhere"
)]
pub(crate) struct New<'a> {
    pub(crate) app: Uuid,
    pub(crate) old_release: Option<Uuid>,
    pub(crate) new_release: Uuid,
    pub(crate) strategy: &'a str,
    pub(crate) processes: &'a Processes,
    pub(crate) tags: &'a Tags,
    pub(crate) timeout: i32,
    /// There is nothing to do.
    pub(crate) complete: bool,
}

/// Adds one. The caller has seen, under the app's lock, that none is under way.
pub(crate) async fn add(c: &impl GenericClient, new: &New<'_>) -> Result<Deployment> {
    let sql = format!(
        "INSERT INTO deployments (id, app_id, old_release_id, new_release_id, strategy, status, step, processes, tags,
            deploy_timeout, finished_at)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, CASE WHEN $11 THEN now() END) RETURNING {COLUMNS}"
    );
    let status = if new.complete { "complete" } else { "pending" };
    let params: super::Params<'_> = &[
        &Uuid::new_v4(),
        &new.app,
        &new.old_release,
        &new.new_release,
        &new.strategy,
        &status,
        &word(&Step::Begin)?,
        &Json(new.processes),
        &Json(new.tags),
        &new.timeout,
        &new.complete,
    ];
    read(&only(c, &sql, params).await?)
}

/// One deployment.
pub(crate) async fn find(c: &impl GenericClient, deployment: &str) -> Result<Deployment> {
    let key = id_of("deployment", deployment)?;
    let sql = format!("SELECT {COLUMNS} FROM deployments WHERE id = $1");
    let row = one(c, &sql, &[&key]).await?;
    row.as_ref()
        .map(read)
        .transpose()?
        .ok_or_else(|| Error::not_found("deployment", deployment))
}

/// An app's newest deployments.
pub(crate) async fn of_app(c: &impl GenericClient, app: Uuid) -> Result<Vec<Deployment>> {
    let sql = format!(
        "SELECT {COLUMNS} FROM deployments WHERE app_id = $1 ORDER BY created_at DESC, id LIMIT {LIST_LIMIT}"
    );
    rows(c, &sql, &[&app]).await?.iter().map(read).collect()
}

/// The deployment of an app that is under way.
pub(crate) async fn under_way(c: &impl GenericClient, app: Uuid) -> Result<Option<Deployment>> {
    let sql = format!("SELECT {COLUMNS} FROM deployments WHERE app_id = $1 AND finished_at IS NULL");
    one(c, &sql, &[&app]).await?.as_ref().map(read).transpose()
}

/// Refuses to go on while a deployment of the app is under way.
pub(crate) async fn refuse_while_under_way(c: &impl GenericClient, app: Uuid, what: &str) -> Result<()> {
    match under_way(c, app).await? {
        None => Ok(()),
        Some(deployment) => Err(Error::conflict(format!(
            "{what} has to wait: deployment {} of this app is under way",
            deployment.id
        ))),
    }
}

/// The apps with unfinished deployments.
pub(crate) async fn unfinished_apps(c: &impl GenericClient) -> Result<Vec<Uuid>> {
    let sql = "SELECT app_id FROM deployments WHERE finished_at IS NULL";
    rows(c, sql, &[])
        .await?
        .iter()
        .map(|row| get(row, "app_id"))
        .collect()
}

/// Takes an app's unfinished deployment for this transaction alone; none when another one holds it.
pub(crate) async fn claim(c: &impl GenericClient, app: Uuid) -> Result<Option<Unfinished>> {
    let sql = format!(
        "SELECT {COLUMNS} FROM deployments WHERE app_id = $1 AND finished_at IS NULL FOR UPDATE SKIP LOCKED"
    );
    one(c, &sql, &[&app]).await?.as_ref().map(unfinished).transpose()
}

/// The next step begins; with `failure`, on the way back.
pub(crate) async fn enter(
    c: &impl GenericClient,
    key: Uuid,
    step: Step,
    failure: Option<&str>,
) -> Result<()> {
    let sql = "UPDATE deployments SET step = $2, step_started_at = now(), status = 'running',
               error = coalesce($3, error) WHERE id = $1";
    run(c, sql, &[&key, &word(&step)?, &failure]).await.map(drop)
}

/// It is over.
pub(crate) async fn finish(c: &impl GenericClient, key: Uuid, error: Option<&str>) -> Result<()> {
    let sql = "UPDATE deployments SET status = CASE WHEN $2::text IS NULL THEN 'complete' ELSE 'failed' END,
               error = $2, finished_at = now() WHERE id = $1";
    run(c, sql, &[&key, &error]).await.map(drop)
}

/// Begins the time of every unfinished step anew: while no controller was there, nothing could get on.
pub(crate) async fn restart_clocks(c: &impl GenericClient) -> Result<u64> {
    run(
        c,
        "UPDATE deployments SET step_started_at = now() WHERE finished_at IS NULL",
        &[],
    )
    .await
}

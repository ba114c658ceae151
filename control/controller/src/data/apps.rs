//! Apps.

use deadpool_postgres::GenericClient;
use flynn_api::controller::App;
use flynn_api::{Error, ErrorCode, Result};
use tokio_postgres::Row;
use tokio_postgres::types::Json;
use uuid::Uuid;

use super::{get, id, json, one, only, optional_id, rows, run};

const COLUMNS: &str = "id, name, meta, strategy, deploy_timeout, release_id, created_at, updated_at";

fn read(row: &Row) -> Result<App> {
    Ok(App {
        id: id(row, "id")?,
        name: get(row, "name")?,
        meta: json(row, "meta")?,
        strategy: get(row, "strategy")?,
        release_id: optional_id(row, "release_id")?,
        deploy_timeout: get(row, "deploy_timeout")?,
        created_at: get(row, "created_at")?,
        updated_at: get(row, "updated_at")?,
    })
}

/// An app with its id ready for queries.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) id: Uuid,
    pub(crate) app: App,
}

fn found(row: &Row) -> Result<Found> {
    Ok(Found {
        id: get(row, "id")?,
        app: read(row)?,
    })
}

/// The app with this id or name.
pub(crate) async fn find(c: &impl GenericClient, id_or_name: &str) -> Result<Found> {
    search(c, id_or_name, false).await
}

/// The app with this id or name, deleted ones included: their jobs may still be ending.
pub(crate) async fn find_any(c: &impl GenericClient, id_or_name: &str) -> Result<Found> {
    search(c, id_or_name, true).await
}

/// The app with this id or name, while this transaction alone changes its desired state: releases, formations,
/// deployments.
pub(crate) async fn claim(c: &impl GenericClient, id_or_name: &str) -> Result<Found> {
    let found = find(c, id_or_name).await?;
    lock(c, found.id).await?;
    // It may have changed, or gone, while we waited.
    find(c, &found.app.id).await
}

/// Keeps others from changing an app's desired state. References to the app may still be made.
pub(crate) async fn lock(c: &impl GenericClient, key: Uuid) -> Result<()> {
    rows(c, "SELECT 1 FROM apps WHERE id = $1 FOR NO KEY UPDATE", &[&key])
        .await
        .map(drop)
}

async fn search(c: &impl GenericClient, id_or_name: &str, deleted: bool) -> Result<Found> {
    let row = if let Ok(id) = Uuid::try_parse(id_or_name) {
        let sql = format!("SELECT {COLUMNS} FROM apps WHERE id = $1 AND (deleted_at IS NULL OR $2)");
        one(c, &sql, &[&id, &deleted]).await?
    } else {
        let sql = format!(
            "SELECT {COLUMNS} FROM apps WHERE name = $1 AND (deleted_at IS NULL OR $2)
             ORDER BY deleted_at DESC NULLS FIRST LIMIT 1"
        );
        one(c, &sql, &[&id_or_name, &deleted]).await?
    };
    row.as_ref()
        .map(found)
        .transpose()?
        .ok_or_else(|| Error::not_found("app", format!("{id_or_name:?}")))
}

/// All apps, newest first.
pub(crate) async fn list(c: &impl GenericClient) -> Result<Vec<App>> {
    let sql = format!("SELECT {COLUMNS} FROM apps WHERE deleted_at IS NULL ORDER BY created_at DESC, id");
    rows(c, &sql, &[]).await?.iter().map(read).collect()
}

/// Adds one. The same app (by id and content) added again is the one that is there.
pub(crate) async fn add(c: &impl GenericClient, app: &App) -> Result<(Found, bool)> {
    let key = Uuid::try_parse(&app.id).map_err(|_| Error::invalid_field("id", "must be a UUID"))?;
    let sql = format!(
        "INSERT INTO apps (id, name, meta, strategy, deploy_timeout) VALUES ($1, $2, $3, $4, $5)
         ON CONFLICT DO NOTHING RETURNING {COLUMNS}"
    );
    let params: super::Params<'_> = &[
        &key,
        &app.name,
        &Json(&app.meta),
        &app.strategy,
        &app.deploy_timeout,
    ];
    if let Some(row) = one(c, &sql, params).await? {
        return Ok((found(&row)?, true));
    }
    match find(c, &app.id).await {
        Ok(there) if there.app.name == app.name => Ok((there, false)),
        Ok(_) => Err(exists(format!(
            "another app has the id {}: leave `id` out to get a new one",
            app.id
        ))),
        Err(_) => Err(exists(format!(
            "there is an app named {} already: choose another name",
            app.name
        ))),
    }
}

fn exists(message: String) -> Error {
    Error::new(ErrorCode::ObjectExists, message)
}

/// Changes what can be changed: labels, strategy, timeout.
pub(crate) async fn update(c: &impl GenericClient, key: Uuid, app: &App) -> Result<App> {
    let sql = format!(
        "UPDATE apps SET meta = $2, strategy = $3, deploy_timeout = $4, updated_at = now() WHERE id = $1
         RETURNING {COLUMNS}"
    );
    let params: super::Params<'_> = &[&key, &Json(&app.meta), &app.strategy, &app.deploy_timeout];
    read(&only(c, &sql, params).await?)
}

/// Makes a release the current one.
pub(crate) async fn set_release(c: &impl GenericClient, key: Uuid, release: Uuid) -> Result<App> {
    let sql =
        format!("UPDATE apps SET release_id = $2, updated_at = now() WHERE id = $1 RETURNING {COLUMNS}");
    read(&only(c, &sql, &[&key, &release]).await?)
}

/// Deletes one, softly.
pub(crate) async fn delete(c: &impl GenericClient, key: Uuid) -> Result<()> {
    run(
        c,
        "UPDATE apps SET deleted_at = now(), updated_at = now() WHERE id = $1",
        &[&key],
    )
    .await
    .map(drop)
}

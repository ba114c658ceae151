//! Formations: how many of each process type shall run.

use deadpool_postgres::GenericClient;
use flynn_api::controller::{ExpandedFormation, Formation, Processes, Release, Tags};
use flynn_api::{Error, ErrorCode, Result};
use tokio_postgres::Row;
use tokio_postgres::types::Json;
use uuid::Uuid;

use super::{apps, artifacts, get, id, json, one, only, releases, rows};

const COLUMNS: &str = "app_id, release_id, processes, tags, generation, created_at, updated_at";

fn read(row: &Row) -> Result<Formation> {
    Ok(Formation {
        app_id: id(row, "app_id")?,
        release_id: id(row, "release_id")?,
        processes: json(row, "processes")?,
        tags: json(row, "tags")?,
        generation: u64::try_from(get::<i64>(row, "generation")?).unwrap_or_default(),
        created_at: get(row, "created_at")?,
        updated_at: get(row, "updated_at")?,
    })
}

/// A formation, if there is one.
pub(crate) async fn find(c: &impl GenericClient, app: Uuid, release: Uuid) -> Result<Option<Formation>> {
    let sql = format!(
        "SELECT {COLUMNS} FROM formations WHERE app_id = $1 AND release_id = $2 AND deleted_at IS NULL"
    );
    one(c, &sql, &[&app, &release])
        .await?
        .as_ref()
        .map(read)
        .transpose()
}

/// An app's formations.
pub(crate) async fn of_app(c: &impl GenericClient, app: Uuid) -> Result<Vec<Formation>> {
    let sql = format!(
        "SELECT {COLUMNS} FROM formations WHERE app_id = $1 AND deleted_at IS NULL ORDER BY created_at"
    );
    rows(c, &sql, &[&app]).await?.iter().map(read).collect()
}

/// The keys of all formations; of those alone that want something, if `active`.
pub(crate) async fn keys(c: &impl GenericClient, active: bool) -> Result<Vec<(Uuid, Uuid)>> {
    let sql = "SELECT app_id, release_id FROM formations f WHERE deleted_at IS NULL AND (NOT $1
               OR EXISTS (SELECT 1 FROM jsonb_each(processes) p WHERE p.value <> '0'))
               ORDER BY created_at";
    let read = |row: &Row| Ok((get(row, "app_id")?, get(row, "release_id")?));
    rows(c, sql, &[&active]).await?.iter().map(read).collect()
}

/// A formation with all that the scheduler needs; `deleted` when it is gone.
pub(crate) async fn expand(c: &impl GenericClient, app: Uuid, release: Uuid) -> Result<ExpandedFormation> {
    let formation = find(c, app, release).await?;
    let release = releases::get_by_id(c, release).await?.map_or_else(
        || Release {
            id: release.to_string(),
            ..Release::default()
        },
        |found| found.release,
    );
    let artifacts = artifacts::of_release(c, &release.id).await?;
    let app = apps::find_any(c, &app.to_string()).await?.app;
    let deleted = formation.is_none();
    let formation = formation.unwrap_or_default();
    Ok(ExpandedFormation {
        app,
        release,
        artifacts,
        processes: formation.processes,
        tags: formation.tags,
        generation: formation.generation,
        updated_at: formation.updated_at,
        deleted,
    })
}

/// Puts a formation. With `expected`, only over that generation (0: only where there is none).
pub(crate) async fn put(
    c: &impl GenericClient,
    app: Uuid,
    release: Uuid,
    processes: &Processes,
    tags: &Tags,
    expected: Option<u64>,
) -> Result<Formation> {
    let there = find(c, app, release).await?;
    let generation = there.as_ref().map_or(0, |formation| formation.generation);
    if let Some(expected) = expected
        && expected != generation
    {
        let message = format!(
            "the formation has changed: its generation is {generation}, not {expected}. Read it again, then retry"
        );
        let mut error = Error::new(ErrorCode::PreconditionFailed, message);
        error.detail = Some(serde_json::json!({ "generation": generation }));
        return Err(error);
    }
    if let Some(there) = there
        && there.processes == *processes
        && there.tags == *tags
    {
        return Ok(there);
    }
    let sql = format!(
        "INSERT INTO formations AS f (app_id, release_id, processes, tags) VALUES ($1, $2, $3, $4)
         ON CONFLICT (app_id, release_id) DO UPDATE SET processes = $3, tags = $4, generation = f.generation + 1,
         updated_at = now(), deleted_at = NULL RETURNING {COLUMNS}"
    );
    read(&only(c, &sql, &[&app, &release, &Json(processes), &Json(tags)]).await?)
}

/// Deletes a formation. Its row stays, empty. Gives what it was, if it was there.
pub(crate) async fn delete(c: &impl GenericClient, app: Uuid, release: Uuid) -> Result<Option<Formation>> {
    let sql = format!(
        "UPDATE formations SET processes = '{{}}', generation = generation + 1, updated_at = now(), deleted_at = now()
         WHERE app_id = $1 AND release_id = $2 AND deleted_at IS NULL RETURNING {COLUMNS}"
    );
    one(c, &sql, &[&app, &release])
        .await?
        .as_ref()
        .map(read)
        .transpose()
}

//! Releases. They never change.

use deadpool_postgres::GenericClient;
use flynn_api::controller::Release;
use flynn_api::{Error, ErrorCode, Result};
use tokio_postgres::Row;
use tokio_postgres::types::Json;
use uuid::Uuid;

use super::{LIST_LIMIT, get, id, id_of, json, one, only, optional_id, rows, run};

const COLUMNS: &str = "r.id, r.app_id, r.env, r.meta, r.processes, r.created_at,
    ARRAY(SELECT artifact_id FROM release_artifacts a WHERE a.release_id = r.id ORDER BY position) AS artifacts";

fn read(row: &Row) -> Result<Release> {
    let artifacts: Vec<Uuid> = get(row, "artifacts")?;
    Ok(Release {
        id: id(row, "id")?,
        app_id: optional_id(row, "app_id")?,
        artifact_ids: artifacts.iter().map(Uuid::to_string).collect(),
        env: json(row, "env")?,
        meta: json(row, "meta")?,
        processes: json(row, "processes")?,
        created_at: get(row, "created_at")?,
    })
}

/// A release with its id ready for queries.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) id: Uuid,
    pub(crate) release: Release,
}

/// One release, its environment in full.
pub(crate) async fn find(c: &impl GenericClient, release: &str) -> Result<Found> {
    let key = id_of("release", release)?;
    get_by_id(c, key)
        .await?
        .ok_or_else(|| Error::not_found("release", release))
}

/// One release by its id.
pub(crate) async fn get_by_id(c: &impl GenericClient, key: Uuid) -> Result<Option<Found>> {
    let sql = format!("SELECT {COLUMNS} FROM releases r WHERE r.id = $1 AND r.deleted_at IS NULL");
    let row = one(c, &sql, &[&key]).await?;
    row.as_ref()
        .map(|row| {
            Ok(Found {
                id: key,
                release: read(row)?,
            })
        })
        .transpose()
}

/// Whether there is or was such a release.
pub(crate) async fn is_known(c: &impl GenericClient, key: Uuid) -> Result<bool> {
    Ok(one(c, "SELECT 1 FROM releases WHERE id = $1", &[&key])
        .await?
        .is_some())
}

/// The newest releases.
pub(crate) async fn list(c: &impl GenericClient) -> Result<Vec<Release>> {
    let sql = format!(
        "SELECT {COLUMNS} FROM releases r WHERE r.deleted_at IS NULL ORDER BY r.created_at DESC, r.id
         LIMIT {LIST_LIMIT}"
    );
    rows(c, &sql, &[]).await?.iter().map(read).collect()
}

/// An app's newest releases: its own, and those that it has a formation of or runs.
pub(crate) async fn of_app(c: &impl GenericClient, app: Uuid) -> Result<Vec<Release>> {
    let sql = format!(
        "SELECT {COLUMNS} FROM releases r WHERE r.deleted_at IS NULL AND (r.app_id = $1
         OR EXISTS (SELECT 1 FROM formations f WHERE f.app_id = $1 AND f.release_id = r.id AND f.deleted_at IS NULL)
         OR EXISTS (SELECT 1 FROM apps WHERE apps.id = $1 AND apps.release_id = r.id))
         ORDER BY r.created_at DESC, r.id LIMIT {LIST_LIMIT}"
    );
    rows(c, &sql, &[&app]).await?.iter().map(read).collect()
}

/// Adds one. The same release added again (by id) is the one that is there.
pub(crate) async fn add(c: &impl GenericClient, release: &Release) -> Result<(Release, bool)> {
    let key = Uuid::try_parse(&release.id).map_err(|_| Error::invalid_field("id", "must be a UUID"))?;
    let app = release
        .app_id
        .as_deref()
        .map(|app| id_of("app", app))
        .transpose()?;
    let sql = "INSERT INTO releases (id, app_id, env, meta, processes) VALUES ($1, $2, $3, $4, $5)
               ON CONFLICT DO NOTHING";
    let params: super::Params<'_> = &[
        &key,
        &app,
        &Json(&release.env),
        &Json(&release.meta),
        &Json(&release.processes),
    ];
    let added = run(c, sql, params).await? == 1;
    if added {
        let artifacts: Vec<Uuid> = release
            .artifact_ids
            .iter()
            .map(|id| id_of("artifact", id))
            .collect::<Result<_>>()?;
        let sql = "INSERT INTO release_artifacts (release_id, position, artifact_id)
                   SELECT $1, position, artifact FROM unnest($2::uuid[]) WITH ORDINALITY AS u (artifact, position)";
        run(c, sql, &[&key, &artifacts]).await?;
    }
    let there = find(c, &release.id)
        .await
        .map_err(|_| taken(&release.id))?
        .release;
    let same = Release {
        created_at: None,
        ..there.clone()
    } == Release {
        created_at: None,
        ..release.clone()
    };
    if same {
        Ok((there, added))
    } else {
        Err(taken(&release.id))
    }
}

fn taken(id: &str) -> Error {
    let message = format!("another release has the id {id}, and releases never change: leave `id` out");
    Error::new(ErrorCode::ObjectExists, message)
}

/// Why a release cannot go, if something uses it.
pub(crate) async fn use_of(c: &impl GenericClient, key: Uuid) -> Result<Option<String>> {
    let sql = "SELECT
        (SELECT name FROM apps WHERE release_id = $1 AND deleted_at IS NULL LIMIT 1) AS current,
        EXISTS (SELECT 1 FROM deployments WHERE finished_at IS NULL AND (old_release_id = $1 OR new_release_id = $1))
            AS deploying,
        EXISTS (SELECT 1 FROM formations f, jsonb_each(f.processes) p WHERE f.release_id = $1
            AND f.deleted_at IS NULL AND p.value <> '0') AS wanted,
        EXISTS (SELECT 1 FROM jobs WHERE release_id = $1 AND state <> 'down') AS running";
    let row = only(c, sql, &[&key]).await?;
    let current: Option<String> = get(&row, "current")?;
    Ok(if let Some(app) = current {
        Some(format!(
            "it is the current release of {app}: deploy another one first"
        ))
    } else if get(&row, "deploying")? {
        Some("a deployment uses it: wait until that is over".into())
    } else if get(&row, "wanted")? {
        Some("processes of it are wanted: scale it to nothing first".into())
    } else if get(&row, "running")? {
        Some("jobs of it run: wait until they are down, or stop them".into())
    } else {
        None
    })
}

/// Deletes one, softly.
pub(crate) async fn delete(c: &impl GenericClient, key: Uuid) -> Result<()> {
    run(c, "UPDATE releases SET deleted_at = now() WHERE id = $1", &[&key]).await?;
    let sql = "UPDATE formations SET deleted_at = now(), generation = generation + 1
               WHERE release_id = $1 AND deleted_at IS NULL";
    run(c, sql, &[&key]).await.map(drop)
}

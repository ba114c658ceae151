//! Artifacts.

use deadpool_postgres::GenericClient;
use flynn_api::image::{Artifact, Hashes};
use flynn_api::{Error, Result};
use tokio_postgres::Row;
use tokio_postgres::types::Json;
use uuid::Uuid;

use super::{LIST_LIMIT, get, id, id_of, json, of_word, one, rows, word};

const COLUMNS: &str = "id, kind, uri, digest, layer_url_template, meta, manifest, size, created_at";

fn read(row: &Row) -> Result<Artifact> {
    let digest: String = get(row, "digest")?;
    let size: Option<i64> = get(row, "size")?;
    Ok(Artifact {
        id: id(row, "id")?,
        kind: of_word(get(row, "kind")?)?,
        uri: get(row, "uri")?,
        meta: json(row, "meta")?,
        manifest: get::<Option<Json<_>>>(row, "manifest")?.map(|Json(manifest)| manifest),
        hashes: digest.parse().ok().map(|sha512_256| Hashes { sha512_256 }),
        size: size.and_then(|size| size.try_into().ok()),
        layer_url_template: get(row, "layer_url_template")?,
        created_at: get(row, "created_at")?,
    })
}

/// One artifact.
pub(crate) async fn find(c: &impl GenericClient, artifact: &str) -> Result<Artifact> {
    let key = id_of("artifact", artifact)?;
    let sql = format!("SELECT {COLUMNS} FROM artifacts WHERE id = $1");
    let row = one(c, &sql, &[&key]).await?;
    row.as_ref()
        .map(read)
        .transpose()?
        .ok_or_else(|| Error::not_found("artifact", artifact))
}

/// The newest artifacts.
pub(crate) async fn list(c: &impl GenericClient) -> Result<Vec<Artifact>> {
    let sql = format!("SELECT {COLUMNS} FROM artifacts ORDER BY created_at DESC, id LIMIT {LIST_LIMIT}");
    rows(c, &sql, &[]).await?.iter().map(read).collect()
}

/// A release's artifacts, lowest layer first.
pub(crate) async fn of_release(c: &impl GenericClient, release: &str) -> Result<Vec<Artifact>> {
    let key = id_of("release", release)?;
    let sql = format!(
        "SELECT {COLUMNS} FROM artifacts JOIN release_artifacts ON artifact_id = id WHERE release_id = $1
         ORDER BY position"
    );
    rows(c, &sql, &[&key]).await?.iter().map(read).collect()
}

/// Which of these ids are unknown.
pub(crate) async fn unknown(c: &impl GenericClient, ids: &[Uuid]) -> Result<Vec<Uuid>> {
    let sql = "SELECT wanted FROM unnest($1::uuid[]) AS wanted
               WHERE NOT EXISTS (SELECT 1 FROM artifacts WHERE id = wanted)";
    rows(c, sql, &[&ids])
        .await?
        .iter()
        .map(|row| get(row, "wanted"))
        .collect()
}

/// Adds one, or finds the same one. Says which.
pub(crate) async fn add(c: &impl GenericClient, artifact: &Artifact) -> Result<(Artifact, bool)> {
    let key = Uuid::try_parse(&artifact.id).map_err(|_| Error::invalid_field("id", "must be a UUID"))?;
    let kind = word(&artifact.kind)?;
    let digest = artifact
        .hashes
        .map(|hashes| hashes.sha512_256.to_string())
        .unwrap_or_default();
    let size = artifact.size.and_then(|size| i64::try_from(size).ok());
    let template = &artifact.layer_url_template;
    let sql = format!(
        "INSERT INTO artifacts (id, kind, uri, digest, layer_url_template, meta, manifest, size)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING RETURNING {COLUMNS}"
    );
    let manifest = artifact.manifest.as_ref().map(Json);
    let meta = Json(&artifact.meta);
    let params: super::Params<'_> = &[
        &key,
        &kind,
        &artifact.uri,
        &digest,
        template,
        &meta,
        &manifest,
        &size,
    ];
    if let Some(row) = one(c, &sql, params).await? {
        return Ok((read(&row)?, true));
    }
    let sql = format!(
        "SELECT {COLUMNS} FROM artifacts WHERE kind = $1 AND md5(uri) = md5($2) AND uri = $2 AND digest = $3
         AND md5(coalesce(layer_url_template, '')) = md5(coalesce($4, ''))"
    );
    match one(c, &sql, &[&kind, &artifact.uri, &digest, template]).await? {
        Some(row) => Ok((read(&row)?, false)),
        None => Err(Error::invalid_field(
            "id",
            "another artifact has it: leave it out to get a new one",
        )),
    }
}

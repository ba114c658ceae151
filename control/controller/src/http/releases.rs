//! `/releases` and `/apps/{app}/release`.

use axum::extract::Path;
use flynn_api::controller::{EventKind, Release};
use flynn_api::server::{Json, StrictJson};
use flynn_api::{Error, Result};
use http::StatusCode;
use serde::Deserialize;

use super::State;
use crate::data::{Change, apps, artifacts, deployments, formations, id_of, releases, scales};
use crate::deploy::worker;
use crate::rules;

/// Names a release.
#[derive(Deserialize)]
pub(crate) struct ReleaseId {
    /// Its id.
    pub(crate) id: String,
}

/// `GET /releases`: the newest.
pub(crate) async fn list(state: State) -> Result<Json<Vec<Release>>> {
    Ok(Json(releases::list(&state.database.client().await?).await?))
}

/// `GET /releases/{id}`.
pub(crate) async fn get(state: State, Path(id): Path<String>) -> Result<Json<Release>> {
    Ok(Json(
        releases::find(&state.database.client().await?, &id)
            .await?
            .release,
    ))
}

/// `GET /apps/{app}/releases`: the newest.
pub(crate) async fn of_app(state: State, Path(app): Path<String>) -> Result<Json<Vec<Release>>> {
    let client = state.database.client().await?;
    let app = apps::find(&client, &app).await?;
    Ok(Json(releases::of_app(&client, app.id).await?))
}

/// `POST /releases`.
pub(crate) async fn create(
    state: State,
    StrictJson(mut release): StrictJson<Release>,
) -> Result<Json<Release>> {
    let mut client = state.database.client().await?;
    let mut change = Change::begin(&mut client).await?;
    let mut system = false;
    if let Some(app) = release.app_id.take() {
        let unknown = |_| Error::invalid_field("app_id", format!("there is no app {app:?}: create it first"));
        let found = apps::find(change.tx(), &app).await.map_err(unknown)?;
        system = found.app.is_system();
        release.app_id = Some(found.app.id);
    }
    let release = rules::release::prepare(release, system)?;
    let ids: Vec<_> = release
        .artifact_ids
        .iter()
        .map(|id| id_of("artifact", id))
        .collect::<Result<_>>()?;
    if let Some(unknown) = artifacts::unknown(change.tx(), &ids).await?.first() {
        let at = ids.iter().position(|id| id == unknown).unwrap_or_default();
        let why = format!("there is no artifact {unknown}: register it with POST /artifacts first");
        return Err(Error::invalid_field(&format!("artifacts[{at}]"), why));
    }
    let (release, added) = releases::add(change.tx(), &release).await?;
    if added {
        let shown = rules::release::redacted(&release);
        change.tell(EventKind::Release, release.app_id.as_deref(), &release.id, &shown)?;
        change.commit().await?;
    }
    Ok(Json(release))
}

/// A release that an app may run: its own, or one of nobody.
pub(crate) async fn usable(
    c: &impl deadpool_postgres::GenericClient,
    app: &apps::Found,
    release: &str,
) -> Result<releases::Found> {
    let found = releases::find(c, release).await?;
    match &found.release.app_id {
        Some(owner) if *owner != app.app.id => {
            let why = format!(
                "belongs to another app: make a release for {} first",
                app.app.name
            );
            Err(Error::invalid_field("release", why))
        }
        _ => Ok(found),
    }
}

/// `GET /apps/{app}/release`.
pub(crate) async fn current(state: State, Path(app): Path<String>) -> Result<Json<Release>> {
    let client = state.database.client().await?;
    let found = apps::find(&client, &app).await?;
    match found.app.release_id {
        Some(release) => Ok(Json(releases::find(&client, &release).await?.release)),
        None => Err(Error::not_found(
            "current release of the app",
            format!("{}: deploy one", found.app.name),
        )),
    }
}

/// `PUT /apps/{app}/release`.
pub(crate) async fn set_current(
    state: State,
    Path(app): Path<String>,
    StrictJson(wanted): StrictJson<ReleaseId>,
) -> Result<Json<Release>> {
    let mut client = state.database.client().await?;
    let mut change = Change::begin(&mut client).await?;
    let found = apps::claim(change.tx(), &app).await?;
    let release = usable(change.tx(), &found, &wanted.id).await?;
    if found.app.release_id.as_ref() != Some(&release.release.id) {
        deployments::refuse_while_under_way(change.tx(), found.id, "setting the release").await?;
        let before = found
            .app
            .release_id
            .as_deref()
            .map(|id| id_of("release", id))
            .transpose()?;
        worker::set_release(&mut change, found.id, before, release.id).await?;
        change.commit().await?;
    }
    Ok(Json(release.release))
}

/// `DELETE /apps/{app}/releases/{id}`.
pub(crate) async fn delete(state: State, Path((app, id)): Path<(String, String)>) -> Result<StatusCode> {
    let mut client = state.database.client().await?;
    let mut change = Change::begin(&mut client).await?;
    let app = apps::claim(change.tx(), &app).await?;
    let found = usable(change.tx(), &app, &id).await?;
    if let Some(why) = releases::use_of(change.tx(), found.id).await? {
        return Err(Error::conflict(format!(
            "the release {id} cannot be deleted: {why}"
        )));
    }
    for request in scales::cancel(change.tx(), app.id, found.id).await? {
        change.tell(EventKind::ScaleRequest, Some(&app.app.id), &request.id, &request)?;
    }
    if let Some(gone) = formations::delete(change.tx(), app.id, found.id).await? {
        change.tell(EventKind::Scale, Some(&app.app.id), &gone.release_id, &gone)?;
    }
    releases::delete(change.tx(), found.id).await?;
    let shown = rules::release::redacted(&found.release);
    change.tell(
        EventKind::ReleaseDeletion,
        Some(&app.app.id),
        &found.release.id,
        &shown,
    )?;
    change.commit().await?;
    Ok(StatusCode::OK)
}

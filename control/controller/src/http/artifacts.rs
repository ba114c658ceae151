//! `/artifacts`.

use axum::extract::Path;
use flynn_api::Result;
use flynn_api::controller::EventKind;
use flynn_api::image::Artifact;
use flynn_api::server::{Json, StrictJson};

use super::State;
use crate::data::{Change, artifacts};
use crate::rules;

/// `GET /artifacts`: the newest.
pub(crate) async fn list(state: State) -> Result<Json<Vec<Artifact>>> {
    Ok(Json(artifacts::list(&state.database.client().await?).await?))
}

/// `GET /artifacts/{id}`.
pub(crate) async fn get(state: State, Path(id): Path<String>) -> Result<Json<Artifact>> {
    Ok(Json(artifacts::find(&state.database.client().await?, &id).await?))
}

/// `POST /artifacts`. The same one again gives the one that is there.
pub(crate) async fn create(
    state: State,
    StrictJson(artifact): StrictJson<Artifact>,
) -> Result<Json<Artifact>> {
    let artifact = rules::artifact::prepare(artifact)?;
    let mut client = state.database.client().await?;
    let mut change = Change::begin(&mut client).await?;
    let (artifact, added) = artifacts::add(change.tx(), &artifact).await?;
    if added {
        let shown = rules::artifact::redacted(&artifact);
        change.tell(EventKind::Artifact, None, &artifact.id, &shown)?;
        change.commit().await?;
    }
    Ok(Json(artifact))
}

//! The operator's last resorts ([`crate::recovery`]): for hosts alone.

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use flynn_api::Error;
use flynn_api::discovery::{
    Consistency, MAX_SNAPSHOT, RecoverRequest, RecoveryPlan, RejoinRequest, RestorePlan,
};
use flynn_api::server::{Json, Peer, StrictJson};
use http::Uri;

use super::asked::{Asked, at};
use super::auth::{Action, Door};
use crate::node::Node;
use crate::recovery;

type App = State<(Node, Door)>;
type From = Extension<Peer>;

pub(super) async fn snapshot(
    State((node, door)): App,
    Extension(peer): From,
    asked: Asked,
) -> Result<Response, Error> {
    door.check(&peer, &Action::Recover)?;
    let consistency = asked.consistency.unwrap_or(Consistency::Linearizable);
    let (index, snapshot) = recovery::snapshot(&node, consistency).await?;
    Ok(at(index, snapshot.into_response()))
}

pub(super) async fn plan(
    State((node, door)): App,
    Extension(peer): From,
) -> Result<Json<RecoveryPlan>, Error> {
    door.check(&peer, &Action::Recover)?;
    recovery::recovery_plan(&node).await.map(Json)
}

pub(super) async fn recover(
    State((node, door)): App,
    Extension(peer): From,
    StrictJson(request): StrictJson<RecoverRequest>,
) -> Result<Json<RecoveryPlan>, Error> {
    door.check(&peer, &Action::Recover)?;
    recovery::recover(&node, request.force).await.map(Json)
}

pub(super) async fn restore(
    State((node, door)): App,
    Extension(peer): From,
    request: Request,
) -> Result<Json<RestorePlan>, Error> {
    door.check(&peer, &Action::Recover)?;
    let (check, force) = (flag(request.uri(), "check")?, flag(request.uri(), "force")?);
    let snapshot = axum::body::to_bytes(request.into_body(), MAX_SNAPSHOT)
        .await
        .map_err(|_| Error::validation("the snapshot is cut short or too long"))?;
    if check {
        recovery::restore_plan(&node, &snapshot).await.map(Json)
    } else {
        recovery::restore(&node, snapshot.into(), force).await.map(Json)
    }
}

pub(super) async fn rejoin(
    State((node, door)): App,
    Extension(peer): From,
    StrictJson(request): StrictJson<RejoinRequest>,
) -> Result<(), Error> {
    door.check(&peer, &Action::Recover)?;
    recovery::rejoin(&node, request).await
}

/// Whether `?name=true` is said.
fn flag(uri: &Uri, name: &str) -> Result<bool, Error> {
    let fields = uri.query().unwrap_or_default().split('&');
    let mut found = fields.filter_map(|field| field.split_once('=').filter(|(key, _)| *key == name));
    match found.next() {
        None | Some((_, "false")) => Ok(false),
        Some((_, "true")) => Ok(true),
        Some(_) => Err(Error::invalid_field(name, "it must be true or false")),
    }
}

//! `/apps/{app}/deploy` and `/deployments`.

use axum::extract::Path;
use axum::response::{IntoResponse as _, Response};
use flynn_api::controller::{Deployment, DeploymentEvent, Event, EventKind, Processes, Tags};
use flynn_api::server::{Json, StrictJson, wants_events};
use flynn_api::{Error, Result};
use futures::{Stream, StreamExt as _};
use http::HeaderMap;

use super::State;
use super::releases::{ReleaseId, usable};
use crate::data::events::Filter;
use crate::data::{Change, apps, deployments, formations, id_of};
use crate::deploy::planner::{self, Strategy, carried_over};
use crate::deploy::worker;
use crate::service::Shared;

/// `POST /apps/{app}/deploy`. Answers at once; a client that accepts events gets the deployment's, to its end.
pub(crate) async fn create(
    state: State,
    Path(app): Path<String>,
    headers: HeaderMap,
    StrictJson(wanted): StrictJson<ReleaseId>,
) -> Result<Response> {
    let mut client = state.database.client().await?;
    let mut change = Change::begin(&mut client).await?;
    let found = apps::claim(change.tx(), &app).await?;
    let unknown = |why: Error| match why.code {
        flynn_api::ErrorCode::NotFound => Error::invalid_field("id", why.message),
        _ => why,
    };
    let new = usable(change.tx(), &found, &wanted.id).await.map_err(unknown)?;
    let strategy: Strategy = found.app.strategy.parse()?;
    deployments::refuse_while_under_way(change.tx(), found.id, "another deployment").await?;
    let old = found
        .app
        .release_id
        .as_deref()
        .map(|id| id_of("release", id))
        .transpose()?;
    let same = old == Some(new.id);
    let before = match old {
        Some(old) if !same => formations::find(change.tx(), found.id, old)
            .await?
            .unwrap_or_default(),
        _ => flynn_api::controller::Formation::default(),
    };
    let processes: Processes =
        carried_over(&before.processes, |kind| new.release.processes.contains_key(kind));
    let has = |kind: &String| new.release.processes.contains_key(kind);
    let tags: Tags = before
        .tags
        .iter()
        .filter(|(kind, _)| has(kind))
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    let strategy = planner::followed(strategy, &new.release, &processes).to_string();
    // Nothing runs: the release is set, and whoever asked scales it.
    let complete = before.processes.values().all(|n| *n == 0);
    let deployment = deployments::New {
        app: found.id,
        old_release: old,
        new_release: new.id,
        strategy: &strategy,
        processes: &processes,
        tags: &tags,
        timeout: found.app.deploy_timeout,
        complete,
    };
    let deployment = deployments::add(change.tx(), &deployment).await?;
    if complete && !same {
        worker::set_release(&mut change, found.id, old, new.id).await?;
    }
    worker::begun(&mut change, &deployment)?;
    change.commit().await?;
    drop(client);
    if wants_events(&headers) {
        stream(&state, deployment).await
    } else {
        Ok(Json(deployment).into_response())
    }
}

/// `GET /deployments/{id}`; as a stream, its [`DeploymentEvent`]s from the first to the last.
pub(crate) async fn get(state: State, Path(id): Path<String>, headers: HeaderMap) -> Result<Response> {
    let deployment = deployments::find(&state.database.client().await?, &id).await?;
    if wants_events(&headers) {
        stream(&state, deployment).await
    } else {
        Ok(Json(deployment).into_response())
    }
}

/// `GET /apps/{app}/deployments`: the newest.
pub(crate) async fn of_app(state: State, Path(app): Path<String>) -> Result<Json<Vec<Deployment>>> {
    let client = state.database.client().await?;
    let app = apps::find(&client, &app).await?;
    Ok(Json(deployments::of_app(&client, app.id).await?))
}

async fn stream(shared: &Shared, deployment: Deployment) -> Result<Response> {
    let filter = Filter {
        app_id: None,
        kinds: vec![EventKind::Deployment],
        object_id: Some(deployment.id.clone()),
    };
    if deployment.finished_at.is_none() {
        let events = shared.feed.subscribe(0, filter, Vec::new()).into_stream();
        return Ok(flynn_api::server::events(to_the_end(events)));
    }
    let past = crate::data::events::after(&shared.database.client().await?, 0, &filter).await?;
    let mut past: Vec<_> = past.into_iter().filter_map(readable).collect();
    if !past.last().is_some_and(|(_, event)| is_last(event)) {
        // Its events are no longer kept; how it ended is.
        past.push((None, ended(deployment)));
    }
    Ok(flynn_api::server::events(futures::stream::iter(past)))
}

fn ended(deployment: Deployment) -> DeploymentEvent {
    DeploymentEvent {
        app_id: deployment.app_id,
        deployment_id: deployment.id,
        release_id: deployment.new_release_id,
        status: deployment.status,
        error: deployment.error,
        ..DeploymentEvent::default()
    }
}

fn readable(event: Event) -> Option<(Option<String>, DeploymentEvent)> {
    Some((
        Some(event.id.to_string()),
        serde_json::from_value(event.data).ok()?,
    ))
}

fn is_last(event: &DeploymentEvent) -> bool {
    event.status == "complete" || event.status == "failed"
}

/// The stream up to and with its last event.
fn to_the_end(
    events: impl Stream<Item = Event> + Send + 'static,
) -> impl Stream<Item = (Option<String>, DeploymentEvent)> + Send {
    let events = Box::pin(events.filter_map(|event| std::future::ready(readable(event))));
    futures::stream::unfold(Some(events), |events| async move {
        let mut events = events?;
        let (id, event) = events.next().await?;
        let rest = (!is_last(&event)).then_some(events);
        Some(((id, event), rest))
    })
}

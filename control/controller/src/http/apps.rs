//! `/apps`.

use axum::extract::Path;
use flynn_api::Result;
use flynn_api::controller::{App, EventKind};
use flynn_api::route::Route;
use flynn_api::server::{Json, StrictJson};
use flynn_api::{Error, ErrorCode};
use http::StatusCode;

use super::State;
use crate::data::{Change, Lock, apps, formations, jobs, lock, routes, scales};
use crate::deploy::worker;
use crate::rules;
use crate::service::Shared;

/// `GET /apps`.
pub(crate) async fn list(state: State) -> Result<Json<Vec<App>>> {
    Ok(Json(apps::list(&state.database.client().await?).await?))
}

/// `GET /apps/{app}`.
pub(crate) async fn get(state: State, Path(app): Path<String>) -> Result<Json<App>> {
    Ok(Json(apps::find(&state.database.client().await?, &app).await?.app))
}

/// `POST /apps`. An app that does not belong to the platform gets its first route with it.
pub(crate) async fn create(state: State, StrictJson(app): StrictJson<App>) -> Result<Json<App>> {
    let app = rules::app::prepare(app)?;
    let mut client = state.database.client().await?;
    let mut change = Change::begin(&mut client).await?;
    lock(change.tx(), Lock::Routes).await?;
    let (found, added) = apps::add(change.tx(), &app).await?;
    if added {
        change.tell(EventKind::App, Some(&found.app.id), &found.app.id, &found.app)?;
        if let Some(domain) = state
            .default_route_domain
            .as_ref()
            .filter(|_| !found.app.is_system())
        {
            default_route(&mut change, &found, domain).await?;
        }
        change.commit().await?;
    }
    Ok(Json(found.app))
}

async fn default_route(change: &mut Change<'_>, found: &apps::Found, domain: &str) -> Result<()> {
    let name = &found.app.name;
    let service = format!("{name}-web");
    let label = |text: &str| text.len() <= 63;
    if !label(name) || !label(&service) {
        // Too long for a DNS label: such an app is reached by routes that are made for it.
        return Ok(());
    }
    let route = rules::route::prepare(Route {
        service,
        domain: format!("{name}.{domain}"),
        drain_backends: true,
        ..Route::default()
    })?;
    let others = routes::on_domain(change.tx(), &route.domain).await?;
    rules::route::fits_domain(&route, name, &others)?;
    let route = routes::add(change.tx(), found.id, &route, None).await?;
    change.tell(EventKind::Route, Some(&found.app.id), &route.id, &route)
}

/// `POST /apps/{app}`: labels, strategy, timeout. What is left out stays.
pub(crate) async fn update(
    state: State,
    Path(app): Path<String>,
    StrictJson(wanted): StrictJson<App>,
) -> Result<Json<App>> {
    change(&state, &app, |app| rules::app::change(app, &wanted)).await
}

/// `POST /apps/{app}/meta`: the labels, all of them.
pub(crate) async fn relabel(
    state: State,
    Path(app): Path<String>,
    StrictJson(wanted): StrictJson<App>,
) -> Result<Json<App>> {
    change(&state, &app, |app| rules::app::relabel(app, &wanted)).await
}

async fn change(shared: &Shared, app: &str, rule: impl FnOnce(App) -> Result<App>) -> Result<Json<App>> {
    let mut client = shared.database.client().await?;
    let mut change = Change::begin(&mut client).await?;
    let found = apps::claim(change.tx(), app).await?;
    let app = apps::update(change.tx(), found.id, &rule(found.app)?).await?;
    change.tell(EventKind::App, Some(&app.id), &app.id, &app)?;
    change.commit().await?;
    Ok(Json(app))
}

/// `DELETE /apps/{app}`, with its formations (so that its jobs end) and its routes.
pub(crate) async fn delete(state: State, Path(app): Path<String>) -> Result<StatusCode> {
    let mut client = state.database.client().await?;
    let mut change = Change::begin(&mut client).await?;
    let found = apps::claim(change.tx(), &app).await?;
    if found.app.is_system() {
        let message = format!(
            "{} belongs to the platform, which would not run without it",
            found.app.name
        );
        return Err(Error::new(ErrorCode::Conflict, message));
    }
    lock(change.tx(), Lock::Routes).await?;
    let key = Some(found.app.id.as_str());
    worker::abandon(&mut change, found.id).await?;
    for route in routes::of_app(change.tx(), found.id).await? {
        let id = route.id.rsplit('/').next().unwrap_or_default();
        routes::delete(change.tx(), crate::data::id_of("route", id)?).await?;
        change.tell(EventKind::RouteDeletion, key, &route.id, &route)?;
    }
    for formation in formations::of_app(change.tx(), found.id).await? {
        let release = crate::data::id_of("release", &formation.release_id)?;
        for request in scales::cancel(change.tx(), found.id, release).await? {
            change.tell(EventKind::ScaleRequest, key, &request.id, &request)?;
        }
        if let Some(gone) = formations::delete(change.tx(), found.id, release).await? {
            change.tell(EventKind::Scale, key, &gone.release_id, &gone)?;
        }
    }
    // Jobs that never got a host have nobody to end them.
    jobs::drop_unplaced(change.tx(), found.id).await?;
    apps::delete(change.tx(), found.id).await?;
    change.tell(EventKind::AppDeletion, key, &found.app.id, &found.app)?;
    change.commit().await?;
    Ok(StatusCode::OK)
}

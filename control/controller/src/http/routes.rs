//! `/routes` and `/apps/{app}/routes`.

use axum::extract::Path;
use flynn_api::Result;
use flynn_api::controller::EventKind;
use flynn_api::route::{Certificate, Route, RouteKind};
use flynn_api::server::{Json, StrictJson};
use http::StatusCode;
use uuid::Uuid;

use super::State;
use crate::data::routes::{Keys, NewCertificate};
use crate::data::{Change, Lock, apps, certificates, id_of, lock, of_word, routes};
use crate::rules;

/// `GET /routes`: all of them, with the keys of their certificates. This is what the router reads.
pub(crate) async fn list(state: State) -> Result<Json<Vec<Route>>> {
    Ok(Json(
        routes::list(&state.database.client().await?, Keys::Shown).await?,
    ))
}

/// `GET /apps/{app}/routes`.
pub(crate) async fn of_app(state: State, Path(app): Path<String>) -> Result<Json<Vec<Route>>> {
    let client = state.database.client().await?;
    let app = apps::find(&client, &app).await?;
    Ok(Json(routes::of_app(&client, app.id).await?))
}

fn key(kind: &str, id: &str) -> Result<(RouteKind, Uuid)> {
    let unknown =
        |_| flynn_api::Error::not_found("route type", format!("{kind:?}: there are http, tcp and udp"));
    Ok((of_word(kind).map_err(unknown)?, id_of("route", id)?))
}

/// `GET /apps/{app}/routes/{type}/{id}`.
pub(crate) async fn get(
    state: State,
    Path((app, kind, id)): Path<(String, String, String)>,
) -> Result<Json<Route>> {
    let (kind, id) = key(&kind, &id)?;
    let client = state.database.client().await?;
    let app = apps::find(&client, &app).await?;
    Ok(Json(routes::find(&client, app.id, kind, id).await?))
}

/// `POST /apps/{app}/routes`.
pub(crate) async fn create(
    state: State,
    Path(app): Path<String>,
    StrictJson(route): StrictJson<Route>,
) -> Result<Json<Route>> {
    let mut route = rules::route::prepare(route)?;
    if let Some(certificate) = &route.certificate {
        rules::certificate::check(certificate)?;
    }
    let mut client = state.database.client().await?;
    let mut change = Change::begin(&mut client).await?;
    // Locked before the app is looked for: one that is being deleted gets no new route.
    lock(change.tx(), Lock::Routes).await?;
    let app = apps::find(change.tx(), &app).await?;
    parent(&route, &app)?;
    match route.kind {
        RouteKind::Http => {
            let others = routes::on_domain(change.tx(), &route.domain).await?;
            rules::route::fits_domain(&route, &app.app.name, &others)?;
        }
        RouteKind::Tcp | RouteKind::Udp => {
            let taken = routes::ports(change.tx(), route.kind).await?;
            route.port = rules::route::choose_port(route.port, &taken)?;
        }
    }
    let certificate = store(&change, route.certificate.as_ref()).await?;
    let route = routes::add(change.tx(), app.id, &route, certificate).await?;
    change.tell(EventKind::Route, Some(&app.app.id), &route.id, &route)?;
    change.commit().await?;
    Ok(Json(route))
}

fn parent(route: &Route, app: &apps::Found) -> Result<()> {
    if route.parent_ref.is_empty() || route.parent_ref == routes::parent_ref(&app.app.id) {
        return Ok(());
    }
    Err(flynn_api::Error::invalid_field(
        "parent_ref",
        "is not that of the app in the path: leave it out",
    ))
}

async fn store(change: &Change<'_>, certificate: Option<&Certificate>) -> Result<Option<Uuid>> {
    match certificate {
        Some(certificate) => certificates::add(change.tx(), certificate).await.map(Some),
        None => Ok(None),
    }
}

/// `PUT /apps/{app}/routes/{type}/{id}`. A certificate without its key, as it was read, stays what it is.
pub(crate) async fn update(
    state: State,
    Path((app, kind, id)): Path<(String, String, String)>,
    StrictJson(wanted): StrictJson<Route>,
) -> Result<Json<Route>> {
    let (kind, id) = key(&kind, &id)?;
    let mut client = state.database.client().await?;
    let mut change = Change::begin(&mut client).await?;
    let app = apps::find(change.tx(), &app).await?;
    lock(change.tx(), Lock::Routes).await?;
    let there = routes::find(change.tx(), app.id, kind, id).await?;
    parent(&wanted, &app)?;
    let route = rules::route::change(&there, Route { kind, ..wanted })?;
    let certificate = match &route.certificate {
        Some(given)
            if given.key.is_empty() && there.certificate.as_ref().is_some_and(|c| is_same(c, given)) =>
        {
            NewCertificate::Keep
        }
        Some(given) => {
            rules::certificate::check(given)?;
            NewCertificate::Set(store(&change, Some(given)).await?)
        }
        None => NewCertificate::Set(None),
    };
    let route = routes::update(change.tx(), app.id, id, &route, certificate).await?;
    change.tell(EventKind::Route, Some(&app.app.id), &route.id, &route)?;
    change.commit().await?;
    Ok(Json(route))
}

fn is_same(there: &Certificate, given: &Certificate) -> bool {
    there.id == given.id && (given.cert.is_empty() || there.cert == given.cert)
}

/// `DELETE /apps/{app}/routes/{type}/{id}`.
pub(crate) async fn delete(
    state: State,
    Path((app, kind, id)): Path<(String, String, String)>,
) -> Result<StatusCode> {
    let (kind, id) = key(&kind, &id)?;
    let mut client = state.database.client().await?;
    let mut change = Change::begin(&mut client).await?;
    let app = apps::find(change.tx(), &app).await?;
    lock(change.tx(), Lock::Routes).await?;
    let route = routes::find(change.tx(), app.id, kind, id).await?;
    let others = routes::on_domain(change.tx(), &route.domain).await?;
    rules::route::deletable(&route, &others)?;
    routes::delete(change.tx(), id).await?;
    change.tell(EventKind::RouteDeletion, Some(&app.app.id), &route.id, &route)?;
    change.commit().await?;
    Ok(StatusCode::OK)
}

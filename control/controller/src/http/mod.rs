//! The HTTP API: one module per resource, each handler thin over [`crate::rules`] and [`crate::data`].

mod apps;
mod artifacts;
mod auth;
mod deployments;
mod events;
mod exec;
mod formations;
mod jobs;
mod log;
mod query;
mod releases;
mod routes;
mod run;
mod status;

use std::sync::Arc;

use axum::Router;
use axum::routing::{get, post, put};
use flynn_api::{Error, ErrorCode};

use crate::service::Shared;

/// What every handler gets.
pub(crate) type State = axum::extract::State<Arc<Shared>>;

/// All paths.
pub(crate) fn router(shared: &Arc<Shared>) -> Router {
    let keyed = Router::new()
        .route("/apps", get(apps::list).post(apps::create))
        .route(
            "/apps/{app}",
            get(apps::get).post(apps::update).delete(apps::delete),
        )
        .route("/apps/{app}/meta", post(apps::relabel))
        .route(
            "/apps/{app}/release",
            get(releases::current).put(releases::set_current),
        )
        .route("/apps/{app}/releases", get(releases::of_app))
        .route(
            "/apps/{app}/releases/{id}",
            axum::routing::delete(releases::delete),
        )
        .route("/releases", get(releases::list).post(releases::create))
        .route("/releases/{id}", get(releases::get))
        .route("/artifacts", get(artifacts::list).post(artifacts::create))
        .route("/artifacts/{id}", get(artifacts::get))
        .route("/formations", get(formations::list))
        .route("/apps/{app}/formations", get(formations::of_app))
        .route(
            "/apps/{app}/formations/{release}",
            get(formations::get)
                .put(formations::put)
                .delete(formations::delete),
        )
        .route("/apps/{app}/scale/{release}", put(formations::scale))
        .route("/active-jobs", get(jobs::active))
        .route("/apps/{app}/jobs", get(jobs::of_app).post(run::run))
        .route(
            "/apps/{app}/jobs/{id}",
            get(jobs::get).put(jobs::put).delete(jobs::stop),
        )
        .route("/apps/{app}/jobs/{id}/exec", post(exec::exec))
        .route("/apps/{app}/jobs/{id}/forward", post(exec::forward))
        .route("/apps/{app}/deploy", post(deployments::create))
        .route("/apps/{app}/deployments", get(deployments::of_app))
        .route("/deployments/{id}", get(deployments::get))
        .route("/routes", get(routes::list))
        .route("/apps/{app}/routes", get(routes::of_app).post(routes::create))
        .route(
            "/apps/{app}/routes/{type}/{id}",
            get(routes::get).put(routes::update).delete(routes::delete),
        )
        .route("/events", get(events::list))
        .route("/events/{id}", get(events::get))
        .route("/apps/{app}/log", get(log::log))
        .fallback(|| async {
            Error::new(
                ErrorCode::NotFound,
                "there is no such path in the controller's API: check its spelling",
            )
        })
        .method_not_allowed_fallback(|| async {
            let message = "this path does not take that method: check the API's description";
            (
                http::StatusCode::METHOD_NOT_ALLOWED,
                flynn_api::server::Json(Error::validation(message)),
            )
        })
        .layer(axum::middleware::from_fn_with_state(
            Arc::clone(shared),
            auth::check,
        ));
    Router::new()
        .route("/.well-known/status", get(status::status))
        .route("/ping", get(status::ping))
        .route("/ca-cert", get(status::ca_cert))
        .merge(keyed)
        .with_state(Arc::clone(shared))
}

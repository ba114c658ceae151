//! The HTTP API ([`flynn_api::discovery`]).

mod asked;
pub mod auth;
mod ca;
pub mod cluster;
mod input;
mod platform;
mod recovery;
mod services;
mod stream;

use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{delete, get, post, put};
use axum::{Extension, Router};
use flynn_api::server::{Json, Peer};
use flynn_api::{Error, discovery};
use http::StatusCode;
use http::header::CONTENT_TYPE;

use self::auth::{Action, Door};
use crate::node::Node;
use crate::raft::rpc;

/// The routes as they are behind `door`.
pub fn router(node: Node, door: Door) -> Router {
    let mut routes = Router::new()
        .route("/ping", get(async || StatusCode::OK))
        .route("/.well-known/status", get(status))
        .route("/services", get(services::names))
        .route(
            "/cluster/virtual-networks",
            put(services::set_virtual_networks).get(services::virtual_networks),
        )
        .route(
            "/services/{service}",
            put(services::create).delete(services::remove).get(services::show),
        )
        .route(
            "/services/{service}/meta",
            put(services::set_meta).get(services::meta),
        )
        .route("/services/{service}/instances", get(services::instances))
        .route(
            "/services/{service}/instances/{id}",
            put(services::register).delete(services::deregister),
        )
        .route(
            "/services/{service}/leader",
            put(services::set_leader).get(services::leader),
        )
        .route("/raft/leader", get(cluster::leader))
        .route("/raft/peers", get(cluster::peers))
        .route("/raft/peers/{peer}", delete(cluster::remove))
        .route("/raft/peers/{peer}/vote", put(cluster::set_vote))
        .route("/cluster/members", get(cluster::members))
        .route("/cluster/status", get(cluster::own_status))
        .route("/metrics", get(metrics));
    if door == Door::Cluster {
        routes = routes
            .route("/cluster/tokens", post(cluster::make_token))
            .route("/cluster/join", post(cluster::join))
            .route("/cluster/renew", post(cluster::renew))
            .route("/cluster/snapshot", get(recovery::snapshot))
            .route("/cluster/recovery", get(recovery::plan))
            .route("/cluster/recover", post(recovery::recover))
            .route("/cluster/restore", post(recovery::restore))
            .route("/cluster/rejoin", post(recovery::rejoin))
            .route("/cluster/renew-late", post(ca::renew_late))
            .route("/cluster/ca", get(ca::show))
            .route("/cluster/ca/rotate", post(ca::rotate))
            .merge(rpc::routes());
    }
    routes
        .fallback(async || Error::not_found("call", "of this name"))
        .with_state((node, door))
}

async fn metrics(
    State((node, door)): State<(Node, Door)>,
    Extension(peer): Extension<Peer>,
) -> Result<Response, Error> {
    door.check(&peer, &Action::ReadMembers)?;
    let kind = [(CONTENT_TYPE, "text/plain; version=0.0.4")];
    Ok((kind, crate::metrics::text(&node)).into_response())
}

async fn status(
    State((node, door)): State<(Node, Door)>,
    Extension(peer): Extension<Peer>,
) -> Result<Response, Error> {
    door.check(&peer, &Action::Status)?;
    let leader = node.own_status().leader;
    let healthy = leader.is_some();
    let status = discovery::Status {
        status: if healthy { "healthy" } else { "unhealthy" }.to_owned(),
        leader,
        index: node.view.applied(),
    };
    let code = if healthy {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    Ok((code, Json(status)).into_response())
}

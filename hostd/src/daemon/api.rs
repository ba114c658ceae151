//! The host API ([`flynn_api::host`]).

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, Request as HttpRequest, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use flynn_api::host::{Job, JobEvent, LogLine, NetworkConfig, Resources};
use flynn_api::server::{Json, Peer, StrictJson, disk, events, wants_events};
use flynn_api::tls::PeerIdentity;
use flynn_api::{Digest, Error, ErrorCode, Result};
use futures::{Stream, StreamExt};
use serde::Deserialize;
use tokio::sync::broadcast;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::images::pieces;
use super::table::Entry;
use super::{Daemon, attached, disk_error};
use crate::control::Request;
use crate::logs::Follower;
use crate::logs::sink::Sinks;

/// The daemon, as handlers get it.
pub(super) type Shared = State<Arc<Daemon>>;

/// The routes.
pub(super) fn router(daemon: Arc<Daemon>) -> Router {
    Router::new()
        .route("/host/status", get(status))
        .route("/host/jobs", get(jobs))
        .route("/host/jobs/{id}", get(job).put(add_job).delete(stop_job))
        .route("/host/jobs/{id}/signal/{signal}", put(signal_job))
        .route("/host/jobs/{id}/discoverd-deregister", put(deregister_job))
        .route("/host/jobs/{id}/log", get(log))
        .route("/host/jobs/{id}/exec", post(attached::exec))
        .route("/host/jobs/{id}/forward", post(attached::forward))
        .route("/host/jobs/{id}/limits", put(update_limits))
        .route("/host/jobs/{id}/pause", put(pause))
        .route("/host/jobs/{id}/resume", put(resume))
        .route("/attach", post(attached::attach))
        .route("/host/network", get(network).put(configure_network))
        .route("/host/layers/{digest}", get(layer).put(put_layer))
        .route("/host/network/flows", get(flows))
        .route("/host/network/services", get(services))
        .route("/metrics", get(metrics))
        .merge(super::volumes::router())
        .merge(super::sinks::router())
        .fallback(|| async { Error::new(ErrorCode::NotFound, "there is no such call in the host API") })
        .layer(middleware::from_fn(authorize))
        .with_state(daemon)
}

/// Root on this host may do everything. Of the cluster's components each may look, and those that run jobs may act.
fn may(peer: &Peer, method: &Method, path: &str) -> Result<()> {
    if peer.unix {
        return Ok(());
    }
    let Some(identity) = &peer.identity else {
        return Err(Error::new(
            ErrorCode::Unauthorized,
            "the host API needs a certificate of the cluster",
        ));
    };
    // What a volume holds is more than a look at the host.
    let holds = path.starts_with("/storage/") && path.ends_with("/send");
    let looks = (*method == Method::GET || *method == Method::HEAD) && !holds;
    match identity {
        PeerIdentity::Host(_) => Ok(()),
        PeerIdentity::Job(app) if looks || matches!(app.as_str(), "controller" | "scheduler") => Ok(()),
        PeerIdentity::Job(app) => Err(Error::new(
            ErrorCode::Forbidden,
            format!(
                "jobs of {app} may look at hosts but not act on them; the controller and the scheduler may"
            ),
        )),
    }
}

async fn authorize(request: HttpRequest, next: Next) -> Response {
    let nobody = Peer::default();
    let peer = request.extensions().get::<Peer>().unwrap_or(&nobody);
    match may(peer, request.method(), request.uri().path()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

async fn status(State(daemon): Shared) -> Result<Response> {
    // It looks at disks.
    let status = spawn_blocking(move || daemon.status()).await;
    let status = status.map_err(|error| Error::internal(format!("the status was cut off: {error}")))?;
    Ok(Json(status?).into_response())
}

async fn jobs(State(daemon): Shared, headers: HeaderMap) -> Response {
    if wants_events(&headers) {
        let (current, live) = daemon.table.subscribe();
        let stream = futures::stream::iter(current).chain(job_events(live));
        return events(stream.map(|event| (None, event)));
    }
    let all = daemon.table.all().into_iter();
    let jobs: std::collections::BTreeMap<_, _> = all
        .map(|entry| (entry.job.id.clone(), daemon.table.active(&entry)))
        .collect();
    Json(jobs).into_response()
}

/// Ends when the listener has fallen too far behind: it begins again with what is.
fn job_events(live: broadcast::Receiver<JobEvent>) -> impl Stream<Item = JobEvent> {
    futures::stream::unfold(live, |mut live| async move {
        live.recv().await.ok().map(|event| (event, live))
    })
}

fn find(daemon: &Daemon, id: &str) -> Result<Entry> {
    daemon.table.get(id).ok_or_else(|| Error::not_found("job", id))
}

async fn job(State(daemon): Shared, Path(id): Path<String>) -> Result<Response> {
    Ok(Json(daemon.table.active(&find(&daemon, &id)?)).into_response())
}

async fn add_job(
    State(daemon): Shared,
    Path(id): Path<String>,
    StrictJson(job): StrictJson<Job>,
) -> Result<Response> {
    if job.id != id {
        return Err(Error::invalid_field(
            "id",
            format!("the job says {:?}, the path {id:?}", job.id),
        ));
    }
    done(daemon.add(job).await)
}

/// Nothing, or why not.
fn done(result: Result<()>) -> Result<Response> {
    answer(result.map(|()| Json(serde_json::json!({})).into_response()))
}

/// A full disk has a status of its own.
pub(super) fn answer(result: Result<Response>) -> Result<Response> {
    match result {
        Err(error) if disk::is_full(&error) => {
            Ok((StatusCode::INSUFFICIENT_STORAGE, Json(error)).into_response())
        }
        answer => answer,
    }
}

async fn stop_job(State(daemon): Shared, Path(id): Path<String>) -> Result<Response> {
    done(daemon.stop(&id).await)
}

async fn signal_job(State(daemon): Shared, Path((id, signal)): Path<(String, String)>) -> Result<Response> {
    let signal = signal.parse().ok().filter(|signal| (1..=64).contains(signal));
    let signal = signal.ok_or_else(|| Error::invalid_field("signal", "a number from 1 to 64 is wanted"))?;
    done(daemon.tell(&id, &Request::Signal { signal }).await)
}

async fn pause(State(daemon): Shared, Path(id): Path<String>) -> Result<Response> {
    done(daemon.tell(&id, &Request::Pause { paused: true }).await)
}

async fn resume(State(daemon): Shared, Path(id): Path<String>) -> Result<Response> {
    done(daemon.tell(&id, &Request::Pause { paused: false }).await)
}

async fn update_limits(
    State(daemon): Shared,
    Path(id): Path<String>,
    StrictJson(limits): StrictJson<Resources>,
) -> Result<Response> {
    done(daemon.update_limits(id, limits).await)
}

async fn deregister_job(State(daemon): Shared, Path(id): Path<String>) -> Result<Response> {
    done(daemon.tell(&id, &Request::Deregister).await)
}

#[derive(Deserialize)]
struct LogQuery {
    lines: Option<usize>,
    #[serde(default)]
    follow: bool,
}

async fn log(
    State(daemon): Shared,
    Path(id): Path<String>,
    query: std::result::Result<Query<LogQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Response> {
    let Query(query) =
        query.map_err(|error| Error::validation(format!("lines=n and follow=true|false: {error}")))?;
    find(&daemon, &id)?;
    let follower = Follower::open(&daemon.paths.job(&id).join("log"), query.lines)
        .map_err(|error| disk_error("read the log", &error))?;
    let lines = log_lines(daemon, id, follower, query.follow);
    Ok(events(lines.map(|line| (None, line))))
}

fn log_lines(
    daemon: Arc<Daemon>,
    id: String,
    follower: Follower,
    follow: bool,
) -> impl Stream<Item = LogLine> {
    let state = (daemon, id, follower);
    let batches = futures::stream::unfold(state, move |(daemon, id, mut follower)| async move {
        loop {
            // Before reading: what is over has written all.
            let over = daemon
                .table
                .get(&id)
                .is_none_or(|entry| entry.status.state.is_terminal());
            let lines = follower.read().ok()?;
            if !lines.is_empty() {
                return Some((lines, (daemon, id, follower)));
            }
            if over || !follow {
                return None;
            }
            // The end of a job does not show in its log: it is looked for now and then.
            let _ = timeout(Duration::from_secs(1), follower.changed()).await;
        }
    });
    batches.flat_map(futures::stream::iter)
}

async fn network(State(daemon): Shared) -> Result<Response> {
    Ok(Json(daemon.network_status().await?).into_response())
}

async fn services(State(daemon): Shared) -> Result<Response> {
    Ok(Json(daemon.services.show().await?).into_response())
}

async fn flows(State(daemon): Shared) -> Result<Response> {
    Ok(Json(daemon.flows().await?).into_response())
}

/// For Prometheus.
async fn metrics(State(daemon): Shared) -> Result<Response> {
    let headers = [(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    let mut text = daemon.metrics().await?;
    // It looks at disks.
    let others = spawn_blocking(move || {
        daemon.usage_metrics() + &daemon.sinks().map_or_else(|_| String::new(), Sinks::metrics)
    });
    text += &others.await.unwrap_or_default();
    Ok((headers, text).into_response())
}

async fn configure_network(
    State(daemon): Shared,
    StrictJson(config): StrictJson<NetworkConfig>,
) -> Result<Response> {
    done(daemon.configure_network(config).await)
}

fn parse_digest(text: &str) -> Result<Digest> {
    text.parse()
        .map_err(|error| Error::invalid_field("digest", error))
}

async fn put_layer(
    State(daemon): Shared,
    Path(digest): Path<String>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response> {
    let digest = parse_digest(&digest)?;
    let length = headers
        .get(CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse().ok());
    let stored = match disk::check(daemon.paths.state()) {
        Ok(()) => daemon.store.put(digest, length, pieces(body)).await,
        refused => refused,
    };
    done(stored)
}

async fn layer(State(daemon): Shared, Path(digest): Path<String>) -> Result<Response> {
    let digest = parse_digest(&digest)?;
    let file = tokio::fs::File::open(daemon.paths.layer(digest)).await;
    let file = file.map_err(|_| Error::not_found("layer", digest))?;
    let length = file
        .metadata()
        .await
        .map_err(|error| disk_error("read the layer", &error))?
        .len();
    let chunks = futures::stream::unfold(file, |mut file| async move {
        use tokio::io::AsyncReadExt;
        let mut chunk = bytes::BytesMut::with_capacity(256 << 10);
        match file.read_buf(&mut chunk).await {
            Ok(0) => None,
            Ok(_) => Some((Ok(chunk.freeze()), file)),
            Err(error) => Some((Err(error), file)),
        }
    });
    let headers = [
        (CONTENT_LENGTH, length.to_string()),
        (CONTENT_TYPE, "application/octet-stream".into()),
    ];
    Ok((headers, Body::from_stream(chunks)).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_those_who_run_jobs_may_act() {
        const JOBS: &str = "/host/jobs";
        const SEND: &str = "/storage/volumes/one/send";
        let over_tls = |identity| Peer {
            identity: Some(identity),
            ..Peer::default()
        };
        let job = |app: &str| over_tls(PeerIdentity::Job(app.into()));
        let root = Peer {
            unix: true,
            ..Peer::default()
        };
        let host = over_tls(PeerIdentity::Host("one".into()));
        for peer in [&root, &host, &job("controller"), &job("scheduler")] {
            assert!(may(peer, &Method::PUT, JOBS).is_ok() && may(peer, &Method::GET, JOBS).is_ok());
            assert!(may(peer, &Method::GET, SEND).is_ok());
        }
        assert!(may(&job("router"), &Method::GET, JOBS).is_ok());
        for (method, path) in [
            (Method::PUT, JOBS),
            (Method::POST, JOBS),
            (Method::DELETE, JOBS),
            (Method::GET, SEND),
        ] {
            assert_eq!(
                may(&job("router"), &method, path).unwrap_err().code,
                ErrorCode::Forbidden
            );
        }
        assert_eq!(
            may(&Peer::default(), &Method::GET, JOBS).unwrap_err().code,
            ErrorCode::Unauthorized
        );
    }
}

//! The host API ([`flynn_api::host`]).

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, Query, Request as HttpRequest, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use flynn_api::host::{Job, JobEvent, LogLine, NetworkConfig};
use flynn_api::resources::Resources;
use flynn_api::server::{Json, Peer, StrictJson, disk, events, wants_events};
use flynn_api::tls::PeerIdentity;
use flynn_api::{Error, ErrorCode, Meta, Result};
use futures::{Stream, StreamExt};
use serde::Deserialize;
use tokio::sync::broadcast;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::table::Entry;
use super::{Daemon, attached, disk_error, pass_on, update};
use crate::control::Request;
use crate::floating;
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
        .route("/host/network/flows", get(flows))
        .route("/host/network/services", get(services))
        .route("/metrics", get(metrics))
        .route(update::PATH, post(update::update))
        .route("/host/tags", put(set_tags))
        .route("/host/drain", put(drain).delete(drain_no_more))
        .merge(super::layers::router())
        .merge(super::volumes::router())
        .merge(super::sinks::router())
        .fallback(|| async { Error::new(ErrorCode::NotFound, "there is no such call in the host API") })
        .layer(middleware::from_fn_with_state(
            Arc::clone(&daemon),
            pass_on::admit,
        ))
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
        // Any program of the host's, as root.
        PeerIdentity::Job(_) if path == update::PATH => Err(Error::new(
            ErrorCode::Forbidden,
            "a host is updated by its operator, or by another host",
        )),
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
        // What happens from then on is told by another daemon.
        let gate = daemon.gate.clone();
        let stream = stream.take_until(async move { gate.left().await });
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
pub(super) fn done(result: Result<()>) -> Result<Response> {
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
            let over = daemon.is_over(&id);
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

impl Daemon {
    /// Whether a job has written all that it ever will.
    fn is_over(&self, id: &str) -> bool {
        if self.gate.is_left() {
            // What another daemon follows is known by what is on the disk.
            let status = crate::status::Status::read(&self.paths.job(id)).ok().flatten();
            return status.is_none_or(|status| status.state.is_terminal());
        }
        let entry = self.table.get(id);
        entry.is_none_or(|entry| entry.status.state.is_terminal())
    }
}

async fn set_tags(State(daemon): Shared, StrictJson(tags): StrictJson<Meta>) -> Result<Response> {
    check_tags(&tags)?;
    done(daemon.configure("keep the tags", |config| config.tags = tags))
}

async fn drain(State(daemon): Shared) -> Result<Response> {
    done(daemon.configure("keep that this host is drained", |config| config.draining = true))
}

async fn drain_no_more(State(daemon): Shared) -> Result<Response> {
    done(daemon.configure("keep that this host is not drained", |config| {
        config.draining = false;
    }))
}

/// They travel in each heartbeat and in each status.
fn check_tags(tags: &Meta) -> Result<()> {
    const MOST: usize = 64;
    const LONGEST: usize = 256;
    if tags.len() > MOST {
        return Err(Error::invalid_field("tags", format!("at most {MOST}")));
    }
    for (name, value) in tags {
        // The host's own labels in discoverd.
        let taken = matches!(name.as_str(), "id" | "shutdown" | floating::command::META);
        if name.is_empty() || taken || name.len() > LONGEST || value.len() > LONGEST {
            let why = format!(
                "{name:?}: names are not empty, neither id nor shutdown nor {}, and nothing is longer than {LONGEST} bytes",
                floating::command::META
            );
            return Err(Error::invalid_field("tags", why));
        }
    }
    Ok(())
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

//! The host API ([`flynn_api::host`]).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, Request as HttpRequest, State};
use axum::http::{HeaderMap, Method};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use flynn_api::host::{
    ActiveJob, Flow, HostStatus, Job, JobEvent, LogLine, NetworkConfig, NetworkStatus, ServiceStatus,
};
use flynn_api::resources::Resources;
use flynn_api::server::openapi::{Calls, Done, Metrics};
use flynn_api::server::{Events, Json, OrEvents, Peer, Query, StrictJson, wants_events};
use flynn_api::tls::PeerIdentity;
use flynn_api::{Error, ErrorCode, Meta, Result};
use futures::{Stream, StreamExt};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::attached::{attach, exec, forward};
use super::table::Entry;
use super::update::{self, update};
use super::{Daemon, disk_error, pass_on};
use crate::control::Request;
use crate::floating;
use crate::logs::Follower;
use crate::logs::sink::Sinks;

/// The daemon, as handlers get it.
pub(super) type Shared = State<Arc<Daemon>>;

/// The calls: what is served, and what the document says.
fn calls() -> Calls<Arc<Daemon>> {
    let calls = flynn_api::calls! { Calls::default();
        get "/host/status" => status: "What the host is and how it does";
        get "/host/jobs" => jobs: "All jobs by id; as events first each of them, then what happens to them";
        get "/host/jobs/{id}" => job: "A job and what has happened to it";
        put "/host/jobs/{id}" => add_job: "Starts a job; answers when its supervisor has taken it";
        delete "/host/jobs/{id}" => stop_job: "Stops a job; answers when it is stopping";
        put "/host/jobs/{id}/signal/{signal}" => signal_job: "Sends the signal of this number to a job's process";
        put "/host/jobs/{id}/discoverd-deregister" => deregister_job: "Takes a job out of discoverd, ahead of a stop";
        get "/host/jobs/{id}/log" => log: "A job's output";
        post "/host/jobs/{id}/exec" => exec: "Runs another program in a job's container, and carries its streams";
        post "/host/jobs/{id}/forward" => forward: "Connects to a port in a job's network";
        put "/host/jobs/{id}/limits" => update_limits: "Changes limits of a job that runs";
        put "/host/jobs/{id}/pause" => pause_job: "Has a job's processes stand still, out of discoverd";
        put "/host/jobs/{id}/resume" => resume_job: "Has a paused job go on";
        post "/attach" => attach: "Carries a job's streams";
        get "/host/network" => network: "The host's network and its counters";
        put "/host/network" => configure_network: "Gives the host its part of the cluster's network";
        get "/host/network/flows" => flows: "Connections of the host's containers";
        get "/host/network/services" => services: "Which virtual addresses lead to which instances";
        get "/metrics" => metrics: "Counters and gauges of jobs, network, disks and log sinks";
        post update::PATH => update: "Has another program go on with the daemon's work";
        put "/host/tags" => set_tags: "Sets the tags for placement, all of them";
        put "/host/drain" => drain: "Has the host's jobs go to other hosts";
        delete "/host/drain" => drain_no_more: "Lets the host be given jobs again";
    };
    super::sinks::add(super::volumes::add(super::layers::add(calls)))
}

/// What the document says beside the calls.
fn about() -> Value {
    let description = "Jobs, images, volumes, network and log sinks of one host. On port 1113 over mutual TLS with a \
        certificate of the cluster, where each component may look, and hosts, the controller and the scheduler may act; \
        without TLS on /run/flynn/host.sock for root on the host. Answers may come to have more fields.";
    json!({
        "info": { "title": "Flynn host API", "version": env!("CARGO_PKG_VERSION"), "description": description },
        "security": [{ "cluster": [] }, {}],
        "components": { "securitySchemes": { "cluster": {
            "type": "mutualTLS",
            "description": "A certificate that the cluster's CA has signed",
        } } },
    })
}

/// The routes.
pub(super) fn router(daemon: Arc<Daemon>) -> Router {
    let (routes, _) = calls().finish(about());
    routes
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

async fn status(State(daemon): Shared) -> Result<Json<HostStatus>> {
    // It looks at disks.
    let status = spawn_blocking(move || daemon.status()).await;
    let status = status.map_err(|error| Error::internal(format!("the status was cut off: {error}")))?;
    status.map(Json)
}

async fn jobs(
    State(daemon): Shared,
    headers: HeaderMap,
) -> OrEvents<Json<BTreeMap<String, ActiveJob>>, JobEvent> {
    if wants_events(&headers) {
        let (current, live) = daemon.table.subscribe();
        let stream = futures::stream::iter(current).chain(job_events(live));
        // What happens from then on is told by another daemon.
        let gate = daemon.gate.clone();
        let stream = stream.take_until(async move { gate.left().await });
        return OrEvents::Happens(Events::new(stream));
    }
    let all = daemon.table.all().into_iter();
    let jobs = all.map(|entry| (entry.job.id.clone(), daemon.table.active(&entry)));
    OrEvents::Is(Json(jobs.collect()))
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

async fn job(State(daemon): Shared, Path(id): Path<String>) -> Result<Json<ActiveJob>> {
    Ok(Json(daemon.table.active(&find(&daemon, &id)?)))
}

async fn add_job(
    State(daemon): Shared,
    Path(id): Path<String>,
    StrictJson(job): StrictJson<Job>,
) -> Result<Json<Done>> {
    if job.id != id {
        return Err(Error::invalid_field(
            "id",
            format!("the job says {:?}, the path {id:?}", job.id),
        ));
    }
    done(daemon.add(job).await)
}

/// Nothing, or why not.
pub(super) fn done(result: Result<()>) -> Result<Json<Done>> {
    result.map(|()| Json(Done {}))
}

async fn stop_job(State(daemon): Shared, Path(id): Path<String>) -> Result<Json<Done>> {
    done(daemon.stop(&id).await)
}

async fn signal_job(State(daemon): Shared, Path((id, signal)): Path<(String, String)>) -> Result<Json<Done>> {
    let signal = signal.parse().ok().filter(|signal| (1..=64).contains(signal));
    let signal = signal.ok_or_else(|| Error::invalid_field("signal", "a number from 1 to 64 is wanted"))?;
    done(daemon.tell(&id, &Request::Signal { signal }).await)
}

async fn pause_job(State(daemon): Shared, Path(id): Path<String>) -> Result<Json<Done>> {
    done(daemon.tell(&id, &Request::Pause { paused: true }).await)
}

async fn resume_job(State(daemon): Shared, Path(id): Path<String>) -> Result<Json<Done>> {
    done(daemon.tell(&id, &Request::Pause { paused: false }).await)
}

async fn update_limits(
    State(daemon): Shared,
    Path(id): Path<String>,
    StrictJson(limits): StrictJson<Resources>,
) -> Result<Json<Done>> {
    done(daemon.update_limits(id, limits).await)
}

async fn deregister_job(State(daemon): Shared, Path(id): Path<String>) -> Result<Json<Done>> {
    done(daemon.tell(&id, &Request::Deregister).await)
}

#[derive(Deserialize, JsonSchema)]
struct LogQuery {
    /// So many of the last lines; all when absent.
    lines: Option<usize>,
    /// Go on with what comes, until the job is over.
    #[serde(default)]
    follow: bool,
}

async fn log(
    State(daemon): Shared,
    Path(id): Path<String>,
    Query(query): Query<LogQuery>,
) -> Result<Events<LogLine>> {
    find(&daemon, &id)?;
    let follower = Follower::open(&daemon.paths.job(&id).join("log"), query.lines)
        .map_err(|error| disk_error("read the log", &error))?;
    Ok(Events::new(log_lines(daemon, id, follower, query.follow)))
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

async fn set_tags(State(daemon): Shared, StrictJson(tags): StrictJson<Meta>) -> Result<Json<Done>> {
    check_tags(&tags)?;
    done(daemon.configure("keep the tags", |config| config.tags = tags))
}

async fn drain(State(daemon): Shared) -> Result<Json<Done>> {
    done(daemon.configure("keep that this host is drained", |config| config.draining = true))
}

async fn drain_no_more(State(daemon): Shared) -> Result<Json<Done>> {
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

async fn network(State(daemon): Shared) -> Result<Json<NetworkStatus>> {
    daemon.network_status().await.map(Json)
}

async fn services(State(daemon): Shared) -> Result<Json<Vec<ServiceStatus>>> {
    daemon.services.show().await.map(Json)
}

async fn flows(State(daemon): Shared) -> Result<Json<Vec<Flow>>> {
    daemon.flows().await.map(Json)
}

async fn metrics(State(daemon): Shared) -> Result<Metrics> {
    let mut text = daemon.metrics().await?;
    // It looks at disks.
    let others = spawn_blocking(move || {
        daemon.usage_metrics() + &daemon.sinks().map_or_else(|_| String::new(), Sinks::metrics)
    });
    text += &others.await.unwrap_or_default();
    Ok(Metrics(text))
}

async fn configure_network(
    State(daemon): Shared,
    StrictJson(config): StrictJson<NetworkConfig>,
) -> Result<Json<Done>> {
    let configuring = Arc::clone(&daemon);
    let configure = async move { configuring.configure_network(config).await };
    done(daemon.to_the_end("bringing the network up", configure).await)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// All references beneath a value.
    fn references(value: &Value) -> Vec<&Value> {
        let beneath: Vec<_> = match value {
            Value::Object(fields) => fields.values().collect(),
            Value::Array(items) => items.iter().collect(),
            _ => Vec::new(),
        };
        let beneath = beneath.into_iter().flat_map(references);
        value.get("$ref").into_iter().chain(beneath).collect()
    }

    #[test]
    fn the_document_holds_together() {
        let (_, document) = calls().finish(about());
        let references = references(&document);
        assert!(!references.is_empty());
        for reference in references {
            let pointer = reference.as_str().unwrap().strip_prefix('#').unwrap();
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
        for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
            assert!(jsonschema::meta::is_valid(schema), "{name}: {schema}");
            assert!(schema["description"].is_string(), "{name} says nothing of itself");
        }
        let mut names = BTreeSet::new();
        for (path, calls) in document["paths"].as_object().unwrap() {
            for call in calls.as_object().unwrap().values() {
                assert!(names.insert(call["operationId"].as_str().unwrap()), "{call}");
                let parameters = call["parameters"].as_array().unwrap();
                let in_path = parameters.iter().filter(|parameter| parameter["in"] == "path");
                let declared: Vec<_> = in_path
                    .map(|parameter| format!("{{{}}}", parameter["name"]))
                    .collect();
                let wanted: Vec<_> = path.split('/').filter(|part| part.starts_with('{')).collect();
                assert_eq!(declared.join("").replace('"', ""), wanted.join(""), "{path}");
                let answers = call["responses"].as_object().unwrap();
                assert!(answers.contains_key("default"), "{call}");
                assert!(
                    answers.contains_key("200") != answers.contains_key("101"),
                    "{call}"
                );
            }
        }
    }

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

//! The host API's `/sinks`: where the jobs' logs are sent.

use std::io;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use flynn_api::server::{Json, StrictJson};
use flynn_api::sink::{PORT, Sink};
use flynn_api::{Error, Result};
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;

use super::Daemon;
use super::api::answer;
use crate::logs::sink::{FindLeader, Sinks};

type Shared = State<Arc<Daemon>>;

/// The routes.
pub(super) fn router() -> Router<Arc<Daemon>> {
    Router::new()
        .route("/sinks", get(list))
        .route("/sinks/{id}", put(add).delete(remove))
}

impl Daemon {
    /// Begins to ship the jobs' logs. What cannot be read is said, and keeps the daemon from nothing else.
    pub(super) fn start_sinks(self: &Arc<Self>) {
        match Sinks::open(self.paths.state(), &self.paths.jobs(), self.find_leader()) {
            Ok(sinks) => drop(self.sinks.set(sinks)),
            Err(error) => {
                let notice = format!("logs are sent nowhere, for the list of sinks cannot be read: {error}");
                tracing::error!("{notice}");
                self.notice(notice);
            }
        }
    }

    /// The sinks, unless they could not be read.
    pub(super) fn sinks(&self) -> Result<&Sinks> {
        self.sinks.get().ok_or_else(|| {
            Error::unavailable("the list of sinks (sinks.json in the state directory) could not be read: see `flynn-host status`")
        })
    }

    /// The search for leaders, on the runtime which discoverd's client belongs to.
    fn find_leader(self: &Arc<Self>) -> FindLeader {
        let (daemon, runtime) = (Arc::downgrade(self), Handle::current());
        Arc::new(move |service| {
            let daemon = std::sync::Weak::clone(&daemon);
            let found = runtime.spawn(async move {
                let daemon = daemon.upgrade().ok_or("the daemon stops")?;
                let discovery = daemon.discovery().ok_or("this host is in no cluster yet")?;
                let leader = discovery.leader(&service).await;
                let leader = leader.map_err(|error| format!("who leads {service}: {error}"))?;
                let host = leader
                    .addr
                    .rsplit_once(':')
                    .map_or(&*leader.addr, |(host, _)| host);
                Ok::<_, String>(format!("{host}:{PORT}"))
            });
            Box::pin(async move { found.await.map_err(io::Error::other)?.map_err(io::Error::other) })
        })
    }
}

async fn list(State(daemon): Shared) -> Result<Response> {
    // It looks at disks.
    let listed = spawn_blocking(move || daemon.sinks().map(Sinks::list)).await;
    let listed = listed.map_err(|error| Error::internal(format!("the list was cut off: {error}")))?;
    Ok(Json(listed?).into_response())
}

async fn add(
    State(daemon): Shared,
    Path(id): Path<String>,
    StrictJson(mut sink): StrictJson<Sink>,
) -> Result<Response> {
    if !sink.id.is_empty() && sink.id != id {
        return Err(Error::invalid_field(
            "id",
            format!("the sink says {:?}, the path {id:?}", sink.id),
        ));
    }
    sink.id = id;
    let added = daemon.sinks()?.put(sink.clone()).await;
    answer(added.map(|()| Json(sink).into_response()))
}

async fn remove(State(daemon): Shared, Path(id): Path<String>) -> Result<Response> {
    let removed = daemon.sinks()?.remove(&id).await;
    answer(removed.map(|()| Json(serde_json::json!({})).into_response()))
}

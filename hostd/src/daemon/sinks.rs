//! The host API's `/sinks`: where the jobs' logs are sent.

use std::io;
use std::sync::Arc;

use axum::extract::{Path, State};
use flynn_api::server::openapi::{Calls, Done};
use flynn_api::server::{Json, StrictJson};
use flynn_api::sink::{PORT, Sink, SinkStatus};
use flynn_api::{Error, Result};
use tokio::runtime::Handle;
use tokio::task::spawn_blocking;

use super::Daemon;
use super::api::{Shared, done};
use crate::logs::sink::{FindLeader, Sinks};

/// Adds the calls.
pub(super) fn add(calls: Calls<Arc<Daemon>>) -> Calls<Arc<Daemon>> {
    flynn_api::calls! { calls;
        get "/sinks" => sinks: "Where the jobs' logs are sent, and how that does";
        put "/sinks/{id}" => put_sink: "Has logs sent to a sink";
        delete "/sinks/{id}" => remove_sink: "Has logs sent there no more";
    }
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

async fn sinks(State(daemon): Shared) -> Result<Json<Vec<SinkStatus>>> {
    // It looks at disks.
    let listed = spawn_blocking(move || daemon.sinks().map(Sinks::list)).await;
    let listed = listed.map_err(|error| Error::internal(format!("the list was cut off: {error}")))?;
    listed.map(Json)
}

async fn put_sink(
    State(daemon): Shared,
    Path(id): Path<String>,
    StrictJson(mut sink): StrictJson<Sink>,
) -> Result<Json<Sink>> {
    if !sink.id.is_empty() && sink.id != id {
        return Err(Error::invalid_field(
            "id",
            format!("the sink says {:?}, the path {id:?}", sink.id),
        ));
    }
    sink.id = id;
    let (putting, wanted) = (Arc::clone(&daemon), sink.clone());
    let put = async move { putting.sinks()?.put(wanted).await };
    daemon.to_the_end("changing a sink", put).await?;
    Ok(Json(sink))
}

async fn remove_sink(State(daemon): Shared, Path(id): Path<String>) -> Result<Json<Done>> {
    let removing = Arc::clone(&daemon);
    let remove = async move { removing.sinks()?.remove(&id).await };
    done(daemon.to_the_end("removing a sink", remove).await)
}

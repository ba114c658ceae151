//! The peer's dealings with discoverd: its registration, the watch on the service, the cluster's state.

use std::collections::BTreeMap;
use std::time::Duration;

use flynn_api::client::discovery::DiscoveryClient;
use flynn_api::client::{Http, Watch};
use flynn_api::discovery::{
    Event as Change, EventKind, HEARTBEAT_SECS, Instance, LeaderType, ServiceConfig, ServiceMeta,
};
use flynn_api::tls::Identity;
use flynn_api::{Error as ApiError, ErrorCode};
use flynn_sirenia::{Event, Service, State, Stored, WriteOutcome};
use futures::StreamExt as _;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout_at};

use crate::{Error, Options, SERVICE};

/// How long a call may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between attempts that fail.
const RETRY: Duration = Duration::from_millis(300);
/// How long one watch is trusted: a connection may be dead without anybody saying so.
const WATCH: Duration = Duration::from_secs(30);

/// Discoverd.
#[derive(Clone)]
pub(crate) struct Discovery {
    /// For this host's containers: the registration.
    local: DiscoveryClient,
    /// The cluster port: the state.
    cluster: DiscoveryClient,
    me: Instance,
}

impl Discovery {
    /// Connects to nothing yet.
    pub(crate) fn new(options: &Options, me: Instance) -> Result<Self, Error> {
        let local = Http::new(&options.discoverd)?.timeout(PATIENCE);
        let mut cluster = Http::new(&options.cluster)?.timeout(PATIENCE);
        let learning = |http: Http| match &options.identity {
            Some(dir) => DiscoveryClient::new(http).learning(dir),
            None => DiscoveryClient::new(http),
        };
        // One that cannot be read is no reason to wait.
        if let Some(dir) = &options.identity {
            let identity = Identity::load(dir).and_then(|identity| cluster.identity(&identity));
            cluster = identity.map_err(|why| ApiError::internal(why.to_string()))?;
        }
        Ok(Self {
            local: learning(local),
            cluster: learning(cluster),
            me,
        })
    }

    /// Registers and goes on saying so, for ever.
    pub(crate) async fn stay_registered(&self) {
        let mut trouble = Trouble::new("registering in discoverd");
        loop {
            let result = match self.local.register(SERVICE, &self.me).await {
                Err(error) if error.code == ErrorCode::NotFound => self.make_and_register().await,
                result => result,
            };
            trouble.note(&result);
            sleep(if result.is_ok() {
                Duration::from_secs(HEARTBEAT_SECS)
            } else {
                RETRY
            })
            .await;
        }
    }

    /// Takes the registration back, if that can be done at once.
    pub(crate) async fn deregister(&self) {
        let deadline = Instant::now() + Duration::from_secs(2);
        if let Ok(Err(error)) = timeout_at(deadline, self.local.deregister(SERVICE, &self.me.id)).await {
            tracing::debug!(%error, "not deregistered; the registration runs out");
        }
    }

    /// Tells of the service as it is, and of each change, for ever.
    pub(crate) async fn watch(&self, events: &mpsc::Sender<Event>) {
        let mut trouble = Trouble::new("watching the service in discoverd");
        loop {
            let result = self.watch_once(events).await;
            trouble.note(&result);
            if result.is_err() {
                sleep(RETRY).await;
            }
        }
    }

    async fn watch_once(&self, events: &mpsc::Sender<Event>) -> Result<(), ApiError> {
        let stream = match self.cluster.watch(SERVICE).await {
            Err(error) if error.code == ErrorCode::NotFound => {
                self.make_service().await?;
                self.cluster.watch(SERVICE).await?
            }
            result => result?,
        };
        follow(stream, events).await
    }

    async fn make_and_register(&self) -> Result<(), ApiError> {
        self.make_service().await?;
        self.local.register(SERVICE, &self.me).await
    }

    async fn make_service(&self) -> Result<(), ApiError> {
        self.cluster
            .ensure_service(
                SERVICE,
                &ServiceConfig {
                    leader_type: LeaderType::Manual,
                },
            )
            .await
    }

    /// Writes the state, if it replaces that index, and with it the service's leader.
    pub(crate) async fn write(&self, state: &State, replaces: u64, leader: String) -> WriteOutcome {
        let data = match serde_json::to_value(state) {
            Ok(data) => data,
            Err(error) => {
                tracing::error!(%error, "the state cannot be written as JSON");
                return WriteOutcome::Failed;
            }
        };
        let meta = ServiceMeta {
            data,
            index: replaces,
            leader_id: Some(leader),
        };
        match self.cluster.set_meta(SERVICE, &meta).await {
            Ok(written) => WriteOutcome::Accepted(written.index),
            Err(error) => {
                tracing::warn!(%error, "the cluster's state could not be written");
                match error.code {
                    ErrorCode::Conflict | ErrorCode::ObjectExists | ErrorCode::PreconditionFailed => {
                        WriteOutcome::Conflict
                    }
                    _ => WriteOutcome::Failed,
                }
            }
        }
    }
}

/// Folds one stream of changes into the service as a whole.
async fn follow(mut stream: Watch, events: &mpsc::Sender<Event>) -> Result<(), ApiError> {
    let (mut service, mut whole) = (Fold::default(), false);
    let end = Instant::now() + WATCH;
    while let Ok(Some(change)) = timeout_at(end, stream.next()).await {
        let (_, change) = change?;
        whole |= change.kind == EventKind::Current;
        service.apply(change);
        if whole && events.send(Event::Service(service.whole()?)).await.is_err() {
            return Ok(());
        }
    }
    if whole {
        Ok(())
    } else {
        Err(ApiError::unavailable("the stream ended before it began"))
    }
}

/// A service, as told by its changes.
#[derive(Default)]
struct Fold {
    peers: BTreeMap<String, Instance>,
    leader: Option<String>,
    meta: Option<ServiceMeta>,
}

impl Fold {
    fn apply(&mut self, change: Change) {
        match (change.kind, change.instance) {
            (EventKind::Up | EventKind::Update, Some(instance)) => {
                self.peers.insert(instance.id.clone(), instance);
            }
            (EventKind::Down, Some(instance)) => {
                self.peers.remove(&instance.id);
                self.leader.take_if(|leader| *leader == instance.id);
            }
            (EventKind::Leader, instance) => self.leader = instance.map(|instance| instance.id),
            (EventKind::ServiceMeta, _) => self.meta = change.service_meta,
            _ => {}
        }
    }

    fn whole(&self) -> Result<Service, ApiError> {
        let state = match &self.meta {
            Some(meta) if !meta.data.is_null() => {
                let state: State = serde_json::from_value(meta.data.clone()).map_err(|error| {
                    ApiError::internal(format!(
                        "the metadata of service {SERVICE} is not the state of a cluster ({error}); \
                         put back the state that was there"
                    ))
                })?;
                Some(Stored {
                    state,
                    index: meta.index,
                })
            }
            _ => None,
        };
        Ok(Service {
            peers: self.peers.values().cloned().collect(),
            leader: self.leader.clone(),
            state,
        })
    }
}

/// Says once that something fails, and once that it works again.
struct Trouble {
    doing: &'static str,
    failing: bool,
}

impl Trouble {
    fn new(doing: &'static str) -> Self {
        Self {
            doing,
            failing: false,
        }
    }

    fn note(&mut self, result: &Result<(), ApiError>) {
        match result {
            Ok(()) if self.failing => tracing::info!("{} works again", self.doing),
            Err(error) if !self.failing => tracing::warn!(%error, "{} fails; trying on", self.doing),
            _ => {}
        }
        self.failing = result.is_err();
    }
}

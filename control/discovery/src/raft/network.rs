//! Calls from one member to another, over the cluster listener with mutual TLS.

use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use flynn_api::client::{Http, full};
use flynn_api::tls::{Live, Use};
use flynn_api::{Error, ErrorCode};
use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use openraft::OptionalSend;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::type_config::TypeConfigExt as _;
use openraft::type_config::alias::InstantOf;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::line::{self, caller::Line};
use super::pace::{Pace, Turn};
use super::{Member, Snapshot, SnapshotMeta, TypeConfig, Vote, snapshot};

/// How other members are reached. Clones share connections.
#[derive(Clone)]
pub struct Dialer {
    live: Arc<Live>,
    connections: Arc<Mutex<Connections>>,
    // openraft keeps the link that it made to a member when the member moves; the link asks here where it is now.
    places: Arc<Mutex<HashMap<u64, Place>>>,
    learners: Arc<Mutex<BTreeSet<u64>>>,
}

/// Where a member is.
struct Place {
    /// By the list of members.
    listed: String,
    /// By what was last heard.
    addr: String,
}

/// What there is with one TLS configuration.
#[derive(Default)]
struct Connections {
    made_with: Option<Arc<rustls::ClientConfig>>,
    /// By address.
    clients: HashMap<String, Http>,
    /// By the member's id and address.
    lines: HashMap<(u64, String), Opening>,
}

/// A line that is being opened, or open: whoever wants it meanwhile shares it, and none of them ends it by giving up.
type Opening = Shared<BoxFuture<'static, Result<Arc<Line>, Error>>>;

/// Clients, and lines, that are kept: more than there are members. With fewer, each call to a member would be a new
/// connection, and nearly all of a leader's work would be handshakes.
const MAX_CONNECTIONS: usize = 4096;

/// How long a line may take to open.
const OPEN: Duration = Duration::from_secs(5);

/// How long a member may take to append entries. openraft gives them no longer than a heartbeat: then a member with a slow
/// disk, or too little of a CPU, never gets through a thousand entries that it has to catch up with, and a call that is
/// given up takes its connection with it.
const APPEND: Duration = Duration::from_secs(2);

impl std::fmt::Debug for Dialer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dialer").finish_non_exhaustive()
    }
}

impl Dialer {
    /// With this identity, which may be renewed.
    pub fn new(live: Arc<Live>) -> Self {
        Self {
            live,
            connections: Arc::default(),
            places: Arc::default(),
            learners: Arc::default(),
        }
    }

    /// The identity that is in use.
    pub fn identity(&self) -> Arc<Use> {
        self.live.current()
    }

    /// By the list of members, `id` is at `addr`.
    pub fn learn(&self, id: u64, addr: &str) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if places.get(&id).is_none_or(|known| known.listed != addr) {
            let (listed, addr) = (addr.to_owned(), addr.to_owned());
            places.insert(id, Place { listed, addr });
        }
    }

    /// The member `id` says itself that it is at `addr`, until the list says something new.
    pub fn moved(&self, id: u64, addr: &str) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = places.get_mut(&id) {
            addr.clone_into(&mut place.addr);
        }
    }

    /// These are the members that do not vote.
    pub fn set_learners(&self, ids: BTreeSet<u64>) {
        *self.learners.lock().unwrap_or_else(PoisonError::into_inner) = ids;
    }

    /// How many learners there are, if the member `id` is one of them.
    fn learners(&self, id: u64) -> usize {
        let learners = self.learners.lock().unwrap_or_else(PoisonError::into_inner);
        if learners.contains(&id) { learners.len() } else { 0 }
    }

    fn place(&self, id: u64) -> Result<String, Error> {
        let places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let place = places.get(&id).ok_or_else(|| Error::not_found("member", id))?;
        Ok(place.addr.clone())
    }

    /// Those of the TLS configuration that is in use.
    fn connections(&self) -> MutexGuard<'_, Connections> {
        let tls = &self.live.current().client;
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if connections
            .made_with
            .as_ref()
            .is_none_or(|with| !Arc::ptr_eq(with, tls))
        {
            *connections = Connections {
                made_with: Some(Arc::clone(tls)),
                ..Connections::default()
            };
        }
        connections
    }

    /// A client of the discoverd at `addr`.
    pub fn dial(&self, addr: &str) -> flynn_api::Result<Http> {
        let mut connections = self.connections();
        if let Some(http) = connections.clients.get(addr) {
            return Ok(http.clone());
        }
        let mut http = Http::new(&format!("https://{addr}"))?;
        if let Some(tls) = &connections.made_with {
            http = http.tls(Arc::clone(tls));
        }
        if connections.clients.len() >= MAX_CONNECTIONS {
            connections.clients.clear();
        }
        connections.clients.insert(addr.to_owned(), http.clone());
        Ok(http)
    }

    /// The line to the member `id` at `addr`.
    async fn line(&self, id: u64, addr: &str) -> Result<Arc<Line>, Error> {
        let http = self.dial(addr)?;
        let opening = {
            let mut connections = self.connections();
            let lines = &mut connections.lines;
            let key = (id, addr.to_owned());
            if let Some(opening) = lines.get(&key).filter(|opening| is_of_use(opening)) {
                opening.clone()
            } else {
                let opening: Opening = open(http, id).boxed().shared();
                if lines.len() >= MAX_CONNECTIONS {
                    lines.clear();
                }
                lines.insert(key, opening.clone());
                tokio::spawn(opening.clone());
                opening
            }
        };
        opening.await
    }

    /// Calls the member `id`, whose discoverd is at `addr`.
    ///
    /// # Errors
    ///
    /// What it says, or that nothing came back in time: then the call may have been done.
    pub async fn call<T: DeserializeOwned>(
        &self,
        (id, addr): (u64, &str),
        name: &str,
        body: &impl Serialize,
        patience: Duration,
    ) -> Result<T, Error> {
        let call = async {
            match self.line(id, addr).await {
                Ok(line) => {
                    let answer = line.call(name, body).await?;
                    serde_json::from_slice(&answer).map_err(|why| {
                        Error::internal(format!("the answer to {name} cannot be read: {why}")).or_done()
                    })
                }
                // It is of an earlier release.
                Err(error) if error.code == ErrorCode::NotFound => {
                    let http = self.dial(addr)?.timeout(patience);
                    http.post(&format!("/raft/{id}/{name}"), body).await
                }
                Err(error) => Err(error),
            }
        };
        timeout(patience, call).await.unwrap_or_else(|_| {
            let message = format!("{name}: the discoverd at {addr} did not answer in time");
            Err(Error::new(ErrorCode::Timeout, message))
        })
    }
}

/// Whether a line is open, or may be yet.
fn is_of_use(opening: &Opening) -> bool {
    match opening.peek() {
        None => true,
        Some(Ok(line)) => !line.is_over(),
        Some(Err(_)) => false,
    }
}

async fn open(http: Http, id: u64) -> Result<Arc<Line>, Error> {
    let path = format!("/raft/{id}/{}", line::NAME);
    let connection = timeout(OPEN, http.upgrade(&path, line::PROTOCOL, &())).await;
    let late = |_| Error::unavailable(format!("{} did not answer within 5 s", http.base()));
    Ok(Arc::new(Line::over(connection.map_err(late)??)))
}

impl RaftNetworkFactory<TypeConfig> for Dialer {
    type Network = Link;

    async fn new_client(&mut self, target: u64, node: &Member) -> Link {
        self.learn(target, &node.addr);
        Link {
            target,
            dialer: self.clone(),
            pace: Pace::default(),
        }
    }
}

/// The way to one member.
#[derive(Debug)]
pub struct Link {
    target: u64,
    dialer: Dialer,
    pace: Pace<InstantOf<TypeConfig>>,
}

/// Why there is no answer to a heartbeat that [`Pace`] leaves out. openraft takes it as one that got lost, and learns nothing
/// that is not so.
#[derive(Debug)]
pub struct LeftOut;

impl std::fmt::Display for LeftOut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("left out: the learner has heard this just now")
    }
}

impl std::error::Error for LeftOut {}

impl Link {
    /// Calls the member; the id in the path sees to it that it is the right one.
    async fn call<T: DeserializeOwned>(
        &self,
        what: &str,
        body: &impl Serialize,
        timeout: Duration,
    ) -> Result<T, Error> {
        let addr = self.dialer.place(self.target)?;
        self.dialer.call((self.target, &addr), what, body, timeout).await
    }
}

fn failed(error: &Error) -> RPCError<TypeConfig> {
    match error.code {
        ErrorCode::Timeout => RPCError::Network(NetworkError::new(error)),
        _ => RPCError::Unreachable(Unreachable::new(error)),
    }
}

impl RaftNetworkV2<TypeConfig> for Link {
    type SnapshotData = Vec<u8>;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        let is_heartbeat = rpc.entries.is_empty();
        let heartbeat = is_heartbeat.then_some((rpc.vote, rpc.prev_log_id, rpc.leader_commit));
        let learners = self.dialer.learners(self.target);
        match self.pace.plan(TypeConfig::now(), learners, heartbeat.as_ref()) {
            Turn::Now => {}
            Turn::Later(at) => TypeConfig::sleep_until(at).await,
            Turn::LeftOut => return Err(RPCError::Network(NetworkError::new(&LeftOut))),
        }
        let patience = if is_heartbeat {
            option.soft_ttl()
        } else {
            APPEND.max(option.soft_ttl())
        };
        let began = TypeConfig::now();
        let answer = self.call("append", &rpc, patience).await;
        let taken = matches!(answer, Ok(AppendEntriesResponse::Success));
        self.pace.sent(began, heartbeat.filter(|_| taken));
        answer.map_err(|error| failed(&error))
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.call("vote", &rpc, option.soft_ttl())
            .await
            .map_err(|error| failed(&error))
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.call("pre-vote", &rpc, option.soft_ttl())
            .await
            .map_err(|error| failed(&error))
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let send = async {
            let refuse = |error: &Error| StreamingError::from(failed(error));
            let header: (Vote, SnapshotMeta) = (vote, snapshot.meta);
            let body = snapshot::encode(&header, &snapshot.snapshot)
                .map_err(|error| StreamingError::Network(NetworkError::new(&error)))?;
            let http = self
                .dialer
                .place(self.target)
                .and_then(|addr| self.dialer.dial(&addr))
                .map_err(|error| refuse(&error))?;
            let request = http::Request::post(format!("/raft/{}/snapshot", self.target))
                .body(full(body))
                .map_err(|error| StreamingError::Network(NetworkError::new(&error)))?;
            let answer = tokio::time::timeout(option.soft_ttl(), async {
                let response = http.send(request).await.map_err(|error| refuse(&error))?;
                let body = axum::body::to_bytes(axum::body::Body::new(response.into_body()), 1 << 20).await;
                let body = body.map_err(|error| StreamingError::Network(NetworkError::new(&error)))?;
                serde_json::from_slice(&body)
                    .map_err(|error| StreamingError::Network(NetworkError::new(&error)))
            });
            answer
                .await
                .map_err(|late| StreamingError::Network(NetworkError::new(&late)))?
        };
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            result = send => result,
        }
    }

    async fn transfer_leader(
        &mut self,
        rpc: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.call("transfer-leader", &rpc, option.soft_ttl())
            .await
            .map_err(|error| failed(&error))
    }
}

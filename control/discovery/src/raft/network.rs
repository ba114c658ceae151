//! Calls from one member to another, over the cluster listener with mutual TLS.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use flynn_api::ErrorCode;
use flynn_api::client::{Http, full};
use flynn_api::tls::{Live, Use};
use openraft::OptionalSend;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Member, Snapshot, SnapshotMeta, TypeConfig, Vote, snapshot};

/// How other members are reached. Clones share connections.
#[derive(Clone)]
pub struct Dialer {
    live: Arc<Live>,
    clients: Arc<Mutex<Clients>>,
    // openraft keeps the link that it made to a member when the member moves; the link asks here where it is now.
    places: Arc<Mutex<HashMap<u64, Place>>>,
}

/// Where a member is.
struct Place {
    /// By the list of members.
    listed: String,
    /// By what was last heard.
    addr: String,
}

/// Clients by address, and what they were made with.
type Clients = (Option<Arc<rustls::ClientConfig>>, HashMap<String, Http>);

/// Clients that are kept: more than there are members. With fewer, each call to a member would be a new connection, and
/// nearly all of a leader's work would be handshakes.
const MAX_CLIENTS: usize = 4096;

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
            clients: Arc::default(),
            places: Arc::default(),
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

    fn dial_member(&self, id: u64) -> flynn_api::Result<Http> {
        let place = self
            .places
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&id)
            .map(|place| place.addr.clone());
        self.dial(&place.ok_or_else(|| flynn_api::Error::not_found("member", id))?)
    }

    /// A client of the discoverd at `addr`.
    pub fn dial(&self, addr: &str) -> flynn_api::Result<Http> {
        let tls = Arc::clone(&self.live.current().client);
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let (made_with, clients) = &mut *clients;
        if made_with.as_ref().is_none_or(|with| !Arc::ptr_eq(with, &tls)) {
            clients.clear();
            *made_with = Some(Arc::clone(&tls));
        }
        if let Some(http) = clients.get(addr) {
            return Ok(http.clone());
        }
        let http = Http::new(&format!("https://{addr}"))?.tls(tls);
        if clients.len() >= MAX_CLIENTS {
            clients.clear();
        }
        clients.insert(addr.to_owned(), http.clone());
        Ok(http)
    }
}

impl RaftNetworkFactory<TypeConfig> for Dialer {
    type Network = Link;

    async fn new_client(&mut self, target: u64, node: &Member) -> Link {
        self.learn(target, &node.addr);
        Link {
            target,
            dialer: self.clone(),
        }
    }
}

/// The way to one member.
#[derive(Debug)]
pub struct Link {
    target: u64,
    dialer: Dialer,
}

impl Link {
    /// Calls the member; the id in the path sees to it that it is the right one.
    async fn call<T: DeserializeOwned>(
        &self,
        what: &str,
        body: &impl Serialize,
        timeout: Duration,
    ) -> Result<T, flynn_api::Error> {
        let http = self.dialer.dial_member(self.target)?.timeout(timeout);
        http.post(&format!("/raft/{}/{what}", self.target), body).await
    }
}

fn failed(error: &flynn_api::Error) -> RPCError<TypeConfig> {
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
        let patience = if rpc.entries.is_empty() {
            option.soft_ttl()
        } else {
            APPEND.max(option.soft_ttl())
        };
        self.call("append", &rpc, patience)
            .await
            .map_err(|error| failed(&error))
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
            let refuse = |error: &flynn_api::Error| StreamingError::from(failed(error));
            let header: (Vote, SnapshotMeta) = (vote, snapshot.meta);
            let body = snapshot::encode(&header, &snapshot.snapshot)
                .map_err(|error| StreamingError::Network(NetworkError::new(&error)))?;
            let http = self
                .dialer
                .dial_member(self.target)
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

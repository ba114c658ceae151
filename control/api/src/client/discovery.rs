//! Client of discoverd ([`crate::discovery`]).
//!
//! Every host answers every call, so a client that knows several goes on with the next when one does not, without the
//! caller noticing: with calls that were not made, and with calls that may have been made where twice is the same as
//! once. What became of any other that broke off stays unknown, and the caller is told so ([`Error::may_be_done`]).

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::hosts::{Hosts, Kind};
use super::{EventStream, Http, Watch, encode};
use crate::discovery::{
    CaStatus, Consistency, Event, Instance, JoinRequest, JoinToken, LateRequest, MAX_SNAPSHOT, MemberStatus,
    OwnStatus, Peer, RecoverRequest, RecoveryPlan, RejoinRequest, RenewRequest, RestorePlan, ServiceConfig,
    ServiceInfo, ServiceMeta, SignedIdentity, VirtualNetworks, Voting,
};
use crate::{Error, ErrorCode, Result};

/// How often a change is begun anew because somebody else was faster.
const ATTEMPTS: u32 = 500;

/// Talks to discoverd. Clones share what they know of its hosts.
#[derive(Clone, Debug)]
pub struct DiscoveryClient {
    hosts: Arc<Hosts>,
    consistency: Option<Consistency>,
}

impl DiscoveryClient {
    /// Of this host, and of no other unless it is to be [`Self::learning`].
    pub fn new(http: Http) -> Self {
        Self::over(http, Vec::new())
    }

    /// Of these hosts, of which the first is asked first. A call takes as long as it may take at that one.
    pub fn over(first: Http, others: Vec<Http>) -> Self {
        Self {
            hosts: Arc::new(Hosts::new(first, others)),
            consistency: None,
        }
    }

    /// With the cluster's other members for the time when the chosen host does not answer. They are learnt once that one
    /// has answered, and every minute; they are shown the identity in the directory `tls`, and so is the chosen host when
    /// that identity is renewed.
    #[must_use]
    pub fn learning(self, tls: impl Into<PathBuf>) -> Self {
        Self {
            hosts: Arc::new(self.hosts.learning(tls.into())),
            ..self
        }
    }

    /// One that is [`Self::learning`], with members (`address:1111`) that were known earlier.
    #[must_use]
    pub fn knowing(self, members: impl IntoIterator<Item = String>) -> Self {
        self.hosts.know(members);
        self
    }

    /// With reads that are as fresh as that, rather than as each usually is.
    #[must_use]
    pub fn consistency(mut self, consistency: Consistency) -> Self {
        self.consistency = Some(consistency);
        self
    }

    pub(super) fn hosts(&self) -> &Arc<Hosts> {
        &self.hosts
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let call = |http: Http| async move { http.get(path).await };
        self.hosts.call(Kind::Read, call).await
    }

    async fn put<T: DeserializeOwned>(&self, kind: Kind, path: &str, body: &impl Serialize) -> Result<T> {
        let call = |http: Http| async move { http.put(path, body).await };
        self.hosts.call(kind, call).await
    }

    async fn post<T: DeserializeOwned>(&self, kind: Kind, path: &str, body: &impl Serialize) -> Result<T> {
        let call = |http: Http| async move { http.post(path, body).await };
        self.hosts.call(kind, call).await
    }

    async fn delete(&self, kind: Kind, path: &str) -> Result<()> {
        let call = |http: Http| async move { http.delete(path).await };
        self.hosts.call(kind, call).await
    }

    /// A stream of events, and where it comes from.
    pub(super) async fn events(
        &self,
        path: &str,
        last: Option<&str>,
    ) -> Result<(String, EventStream<Event>)> {
        let call = |http: Http| async move {
            let events = http.events_after(path, last).await?;
            Ok((http.base().to_owned(), events))
        };
        self.hosts.call(Kind::Read, call).await
    }

    async fn read<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        match self.consistency {
            Some(consistency) => self.get(&format!("{path}?consistency={consistency}")).await,
            None => self.get(path).await,
        }
    }

    /// Whether it answers.
    pub async fn ping(&self) -> Result<()> {
        self.get("/ping").await
    }

    /// Makes a service; fails with `object_exists` when it is there.
    pub async fn create_service(&self, service: &str, config: &ServiceConfig) -> Result<()> {
        self.put(Kind::Once, &path(service, ""), config).await
    }

    /// Makes a service unless it is there.
    pub async fn ensure_service(&self, service: &str, config: &ServiceConfig) -> Result<()> {
        match self.put(Kind::Repeatable, &path(service, ""), config).await {
            Err(error) if error.code == ErrorCode::ObjectExists => Ok(()),
            result => result,
        }
    }

    /// Names of all services.
    pub async fn services(&self) -> Result<Vec<String>> {
        self.read("/services").await
    }

    /// What there is to say about a service as a whole.
    pub async fn service(&self, service: &str) -> Result<ServiceInfo> {
        self.read(&path(service, "")).await
    }

    /// All services: what is there, `current`, then changes.
    pub async fn watch_all(&self) -> Result<Watch> {
        Watch::begin(self.clone(), "/services".to_owned(), None).await
    }

    /// [`Self::watch_since`] of all services.
    pub async fn watch_all_since(&self, last: &str) -> Result<Watch> {
        Watch::begin(self.clone(), "/services".to_owned(), Some(last.to_owned())).await
    }

    /// The networks that virtual addresses are from.
    pub async fn virtual_networks(&self) -> Result<VirtualNetworks> {
        self.read("/cluster/virtual-networks").await
    }

    /// Sets them, once.
    pub async fn set_virtual_networks(&self, networks: &VirtualNetworks) -> Result<()> {
        self.put(Kind::Repeatable, "/cluster/virtual-networks", networks)
            .await
    }

    /// Removes a service.
    pub async fn remove_service(&self, service: &str) -> Result<()> {
        // Repeated, it might remove one that somebody has made anew.
        self.delete(Kind::Once, &path(service, "")).await
    }

    /// A service's present state, `current`, then its changes.
    pub async fn watch(&self, service: &str) -> Result<Watch> {
        Watch::begin(self.clone(), path(service, ""), None).await
    }

    /// What has changed in a service since an earlier watch, of any host, had come to the id `last`
    /// ([`Watch::last_id`]), `current`, then its changes. Fails with `gone` when that is too long ago.
    pub async fn watch_since(&self, service: &str, last: &str) -> Result<Watch> {
        Watch::begin(self.clone(), path(service, ""), Some(last.to_owned())).await
    }

    /// A service's metadata.
    pub async fn meta(&self, service: &str) -> Result<ServiceMeta> {
        self.read(&path(service, "/meta")).await
    }

    /// A service's metadata; `None` when the service or its metadata is not there.
    pub async fn find_meta(&self, service: &str) -> Result<Option<ServiceMeta>> {
        match self.meta(service).await {
            Err(error) if error.code == ErrorCode::NotFound => Ok(None),
            result => result.map(Some),
        }
    }

    /// Replaces a service's metadata; `meta.index` is the index that it replaces. Gives what is there now.
    pub async fn set_meta(&self, service: &str, meta: &ServiceMeta) -> Result<ServiceMeta> {
        // discoverd knows the last writes by their keys.
        let key = Uuid::new_v4().to_string();
        let (path, key) = (path(service, "/meta"), key.as_str());
        let call = |http: Http| {
            let path = &path;
            async move { http.put_once(path, key, meta).await }
        };
        self.hosts.call(Kind::Repeatable, call).await
    }

    /// Changes the document that is a service's metadata by compare-and-swap: `change` is done to what is there (or to
    /// the default), anew whenever somebody else was faster, and nothing is written when it changes nothing. Gives what
    /// `change` gave, and the metadata as they are now.
    pub async fn change_meta<D, T>(
        &self,
        service: &str,
        mut change: impl FnMut(&mut D) -> Result<T>,
    ) -> Result<(T, ServiceMeta)>
    where
        D: Clone + Default + PartialEq + Serialize + DeserializeOwned,
    {
        for _ in 0..ATTEMPTS {
            let before = self.find_meta(service).await?;
            let index = before.as_ref().map_or(0, |meta| meta.index);
            let old = before
                .as_ref()
                .map_or_else(|| Ok(D::default()), |meta| D::deserialize(&meta.data))
                .map_err(|why| {
                    Error::internal(format!(
                        "the metadata of {service} in discoverd cannot be read: {why}"
                    ))
                })?;
            let mut new = old.clone();
            let value = change(&mut new)?;
            if let Some(meta) = before
                && old == new
            {
                return Ok((value, meta));
            }
            if index == 0 {
                self.ensure_service(service, &ServiceConfig::default()).await?;
            }
            let data = serde_json::to_value(&new).map_err(|why| Error::internal(why.to_string()))?;
            let meta = ServiceMeta {
                data,
                index,
                leader_id: None,
            };
            match self.set_meta(service, &meta).await {
                Err(error)
                    if matches!(
                        error.code,
                        ErrorCode::PreconditionFailed | ErrorCode::ObjectExists
                    ) && !error.may_be_done() =>
                {
                    // Somebody else has come further: there is no need to wait.
                }
                result => return result.map(|meta| (value, meta)),
            }
        }
        Err(Error::unavailable(format!(
            "the metadata of {service} changes all the time; try again"
        )))
    }

    /// Registers an instance, or renews it (heartbeat).
    pub async fn register(&self, service: &str, instance: &Instance) -> Result<()> {
        let path = path(service, &format!("/instances/{}", encode(&instance.id)));
        self.put(Kind::Repeatable, &path, instance).await
    }

    /// Deregisters an instance.
    pub async fn deregister(&self, service: &str, id: &str) -> Result<()> {
        let path = path(service, &format!("/instances/{}", encode(id)));
        match self.delete(Kind::Repeatable, &path).await {
            // The attempt that broke off was made.
            Err(error) if error.code == ErrorCode::NotFound && error.may_be_done() => Ok(()),
            result => result,
        }
    }

    /// A service's instances; none when there is no such service.
    pub async fn instances(&self, service: &str) -> Result<Vec<Instance>> {
        match self.read(&path(service, "/instances")).await {
            Err(Error {
                code: ErrorCode::NotFound,
                ..
            }) => Ok(Vec::new()),
            result => result,
        }
    }

    /// A service's leader.
    pub async fn leader(&self, service: &str) -> Result<Instance> {
        self.read(&path(service, "/leader")).await
    }

    /// Sets the leader of a `manual` service.
    pub async fn set_leader(&self, service: &str, instance: &Instance) -> Result<()> {
        self.put(Kind::Repeatable, &path(service, "/leader"), instance)
            .await
    }

    /// Raft members.
    pub async fn peers(&self) -> Result<Vec<Peer>> {
        self.get("/raft/peers").await
    }

    /// Members, and how they do.
    pub async fn members(&self) -> Result<Vec<MemberStatus>> {
        self.get("/cluster/members").await
    }

    /// How the discoverd of the chosen host does.
    pub async fn own_status(&self) -> Result<OwnStatus> {
        self.hosts.chosen().get("/cluster/status").await
    }

    /// Says whether a member (its address, host or id) is to vote.
    pub async fn set_vote(&self, member: &str, vote: Voting) -> Result<()> {
        let path = format!("/raft/peers/{}/vote", encode(member));
        self.put(Kind::Repeatable, &path, &vote).await
    }

    /// Takes a member (its address, host or id) out.
    pub async fn remove_peer(&self, addr: &str) -> Result<()> {
        self.delete(Kind::Once, &format!("/raft/peers/{}", encode(addr)))
            .await
    }

    /// All of the registry, as the chosen host tells it, as one file.
    pub async fn snapshot(&self) -> Result<Bytes> {
        let consistency = self.consistency.unwrap_or(Consistency::Linearizable);
        let path = format!("/cluster/snapshot?consistency={consistency}");
        self.hosts.chosen().get_bytes(&path, MAX_SNAPSHOT).await
    }

    /// What it would mean to let the discoverd of the chosen host go on alone.
    pub async fn recovery(&self) -> Result<RecoveryPlan> {
        self.hosts.chosen().get("/cluster/recovery").await
    }

    /// Lets it go on alone. It starts anew for that.
    pub async fn recover(&self, force: bool) -> Result<RecoveryPlan> {
        self.hosts
            .chosen()
            .post("/cluster/recover", &RecoverRequest { force })
            .await
    }

    /// What it would mean to put `snapshot` in place of the registry of the chosen host.
    pub async fn check_restore(&self, snapshot: Bytes) -> Result<RestorePlan> {
        self.hosts
            .chosen()
            .post_bytes("/cluster/restore?check=true", snapshot)
            .await
    }

    /// Puts it there. The discoverd starts anew for that.
    pub async fn restore(&self, snapshot: Bytes, force: bool) -> Result<RestorePlan> {
        let path = format!("/cluster/restore?force={force}");
        self.hosts.chosen().post_bytes(&path, snapshot).await
    }

    /// Has the discoverd of the chosen host leave its cluster and join another. It starts anew for that.
    pub async fn rejoin(&self, request: &RejoinRequest) -> Result<()> {
        self.hosts.chosen().post("/cluster/rejoin", request).await
    }

    /// A token that lets one host join.
    pub async fn join_token(&self) -> Result<JoinToken> {
        self.post(Kind::Once, "/cluster/tokens", &()).await
    }

    /// A new certificate.
    pub async fn renew(&self, request: &RenewRequest) -> Result<SignedIdentity> {
        self.post(Kind::Repeatable, "/cluster/renew", request).await
    }

    /// A new certificate for one that may have run out; over a transport that shows none.
    pub async fn renew_late(&self, request: &LateRequest) -> Result<SignedIdentity> {
        self.hosts.chosen().post("/cluster/renew-late", request).await
    }

    /// How the certificate authority is, as far as it is known there.
    pub async fn ca(&self) -> Result<CaStatus> {
        self.hosts.chosen().get("/cluster/ca").await
    }

    /// Has the certificate authority take another root, unless it is about to.
    pub async fn rotate_ca(&self) -> Result<CaStatus> {
        self.post(Kind::Repeatable, "/cluster/ca/rotate", &()).await
    }

    /// Joins with a token, which the same request may use again.
    pub async fn join(&self, request: &JoinRequest) -> Result<SignedIdentity> {
        self.post(Kind::Repeatable, "/cluster/join", request).await
    }
}

fn path(service: &str, rest: &str) -> String {
    format!("/services/{}{rest}", encode(service))
}

//! Client of discoverd ([`crate::discovery`]).

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{EventStream, Http, encode};
use crate::discovery::{
    Consistency, Event, Instance, JoinRequest, JoinToken, MAX_SNAPSHOT, MemberStatus, OwnStatus, Peer,
    RecoverRequest, RecoveryPlan, RejoinRequest, RenewRequest, RestorePlan, ServiceConfig, ServiceInfo,
    ServiceMeta, SignedIdentity, VirtualNetworks, Voting,
};
use crate::{Error, ErrorCode, Result};

/// How often a change is begun anew because somebody else was faster.
const ATTEMPTS: u32 = 500;

/// Talks to discoverd.
#[derive(Clone, Debug)]
pub struct DiscoveryClient {
    http: Http,
    consistency: Option<Consistency>,
}

impl DiscoveryClient {
    /// Over this transport.
    pub fn new(http: Http) -> Self {
        Self {
            http,
            consistency: None,
        }
    }

    /// With reads that are as fresh as that, rather than as each usually is.
    #[must_use]
    pub fn consistency(mut self, consistency: Consistency) -> Self {
        self.consistency = Some(consistency);
        self
    }

    async fn read<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        match self.consistency {
            Some(consistency) => self.http.get(&format!("{path}?consistency={consistency}")).await,
            None => self.http.get(path).await,
        }
    }

    /// Whether it answers.
    pub async fn ping(&self) -> Result<()> {
        self.http.get("/ping").await
    }

    /// Makes a service; fails with `object_exists` when it is there.
    pub async fn create_service(&self, service: &str, config: &ServiceConfig) -> Result<()> {
        self.http.put(&path(service, ""), config).await
    }

    /// Makes a service unless it is there.
    pub async fn ensure_service(&self, service: &str, config: &ServiceConfig) -> Result<()> {
        match self.create_service(service, config).await {
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

    /// All services: what is there, `current`, then changes. Ends with the connection.
    pub async fn watch_all(&self) -> Result<EventStream<Event>> {
        self.http.events("/services").await
    }

    /// [`Self::watch_since`] of all services.
    pub async fn watch_all_since(&self, last: &str) -> Result<EventStream<Event>> {
        self.http.events_after("/services", Some(last)).await
    }

    /// The networks that virtual addresses are from.
    pub async fn virtual_networks(&self) -> Result<VirtualNetworks> {
        self.read("/cluster/virtual-networks").await
    }

    /// Sets them, once.
    pub async fn set_virtual_networks(&self, networks: &VirtualNetworks) -> Result<()> {
        self.http.put("/cluster/virtual-networks", networks).await
    }

    /// Removes a service.
    pub async fn remove_service(&self, service: &str) -> Result<()> {
        self.http.delete(&path(service, "")).await
    }

    /// A service's present state, `current`, then its changes. Ends with the connection.
    pub async fn watch(&self, service: &str) -> Result<EventStream<Event>> {
        self.http.events(&path(service, "")).await
    }

    /// What has changed in a service since an earlier watch, of any host, had come to the id `last`
    /// ([`EventStream::last_id`]), `current`, then its changes. Fails with `gone` when that is too long ago.
    pub async fn watch_since(&self, service: &str, last: &str) -> Result<EventStream<Event>> {
        self.http.events_after(&path(service, ""), Some(last)).await
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
        self.http.put(&path(service, "/meta"), meta).await
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
                    ) =>
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
        self.http
            .put(
                &path(service, &format!("/instances/{}", encode(&instance.id))),
                instance,
            )
            .await
    }

    /// Deregisters an instance.
    pub async fn deregister(&self, service: &str, id: &str) -> Result<()> {
        self.http
            .delete(&path(service, &format!("/instances/{}", encode(id))))
            .await
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
        self.http.put(&path(service, "/leader"), instance).await
    }

    /// Raft members.
    pub async fn peers(&self) -> Result<Vec<Peer>> {
        self.http.get("/raft/peers").await
    }

    /// Members, and how they do.
    pub async fn members(&self) -> Result<Vec<MemberStatus>> {
        self.http.get("/cluster/members").await
    }

    /// How the discoverd that answers does.
    pub async fn own_status(&self) -> Result<OwnStatus> {
        self.http.get("/cluster/status").await
    }

    /// Says whether a member (its address, host or id) is to vote.
    pub async fn set_vote(&self, member: &str, vote: Voting) -> Result<()> {
        let path = format!("/raft/peers/{}/vote", encode(member));
        self.http.put(&path, &vote).await
    }

    /// Takes a member (its address, host or id) out.
    pub async fn remove_peer(&self, addr: &str) -> Result<()> {
        self.http.delete(&format!("/raft/peers/{}", encode(addr))).await
    }

    /// All of the registry, as one file.
    pub async fn snapshot(&self) -> Result<Bytes> {
        let consistency = self.consistency.unwrap_or(Consistency::Linearizable);
        let path = format!("/cluster/snapshot?consistency={consistency}");
        self.http.get_bytes(&path, MAX_SNAPSHOT).await
    }

    /// What it would mean to let the discoverd that answers go on alone.
    pub async fn recovery(&self) -> Result<RecoveryPlan> {
        self.http.get("/cluster/recovery").await
    }

    /// Lets it go on alone. It starts anew for that.
    pub async fn recover(&self, force: bool) -> Result<RecoveryPlan> {
        self.http
            .post("/cluster/recover", &RecoverRequest { force })
            .await
    }

    /// What it would mean to put `snapshot` in place of the registry of the discoverd that answers.
    pub async fn check_restore(&self, snapshot: Bytes) -> Result<RestorePlan> {
        self.http
            .post_bytes("/cluster/restore?check=true", snapshot)
            .await
    }

    /// Puts it there. The discoverd starts anew for that.
    pub async fn restore(&self, snapshot: Bytes, force: bool) -> Result<RestorePlan> {
        let path = format!("/cluster/restore?force={force}");
        self.http.post_bytes(&path, snapshot).await
    }

    /// Has the discoverd that answers leave its cluster and join another. It starts anew for that.
    pub async fn rejoin(&self, request: &RejoinRequest) -> Result<()> {
        self.http.post("/cluster/rejoin", request).await
    }

    /// A token that lets one host join.
    pub async fn join_token(&self) -> Result<JoinToken> {
        self.http.post("/cluster/tokens", &()).await
    }

    /// A new certificate.
    pub async fn renew(&self, request: &RenewRequest) -> Result<SignedIdentity> {
        self.http.post("/cluster/renew", request).await
    }

    /// Joins with a token.
    pub async fn join(&self, request: &JoinRequest) -> Result<SignedIdentity> {
        self.http.post("/cluster/join", request).await
    }
}

fn path(service: &str, rest: &str) -> String {
    format!("/services/{}{rest}", encode(service))
}

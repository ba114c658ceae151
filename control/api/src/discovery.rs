//! The discoverd API (port 1111): services, their instances, leaders and metadata.
//!
//! | call | what |
//! | --- | --- |
//! | `PUT /services/{s}` | makes a service ([`ServiceConfig`]); 409 `object_exists` when it is there |
//! | `GET /services` | names |
//! | `GET /services` with `Accept: text/event-stream` | [`Event`]s of all services, without metadata: first what is there, `current`, then changes |
//! | `DELETE /services/{s}` | removes it |
//! | `GET /services/{s}` with `Accept: text/event-stream` | [`Event`]s: the present state, `current`, then changes |
//! | `GET /services/{s}` | [`ServiceInfo`] |
//! | `PUT`/`GET /services/{s}/meta` | [`ServiceMeta`]; a write must carry the index that it replaces, 0 to create |
//! | `PUT /services/{s}/instances/{id}` | registers an [`Instance`]; repeated, it is the heartbeat |
//! | `DELETE /services/{s}/instances/{id}` | deregisters |
//! | `GET /services/{s}/instances` | `[`[`Instance`]`]`, or a stream |
//! | `PUT`/`GET /services/{s}/leader` | the leading [`Instance`], or a stream; `PUT` only for `manual` services |
//! | `GET /raft/leader`, `GET /raft/peers` | members as they are known there |
//! | `GET /cluster/members`, `GET /cluster/status` | `[`[`MemberStatus`]`]` by the leader; [`OwnStatus`] |
//! | `PUT /raft/peers/{p}/vote`, `DELETE /raft/peers/{p}` | [`Voting`]; takes a member out. `p`: address, host or id |
//! | `POST /cluster/tokens`, `POST /cluster/join`, `POST /cluster/renew` | [`JoinToken`], [`JoinRequest`], [`RenewRequest`] |
//! | `GET /cluster/snapshot` | all of the registry as one file, for hosts alone |
//! | `GET /cluster/recovery`, `POST /cluster/recover` | [`RecoveryPlan`]; lets this member go on alone ([`RecoverRequest`]) |
//! | `POST /cluster/restore` | puts a snapshot in place of this member's registry, says what is lost ([`RestorePlan`]) |
//! | `POST /cluster/rejoin` | has this member leave its cluster and join another ([`RejoinRequest`]) |
//! | `PUT`/`GET /cluster/virtual-networks` | [`VirtualNetworks`]; they can be set once |
//! | `GET /metrics` | figures in Prometheus' text format |
//! | `GET /ping`, `GET /.well-known/status` | is it there; [`Status`] |
//!
//! Every host answers every call. Writes find their way to the leader. Reads are answered by the host that is asked, as
//! fresh as `?consistency=` wants it ([`Consistency`]): metadata, leaders and virtual networks are `linearizable` unless
//! asked otherwise, all else is `local`. Each answer names in the header `X-Flynn-Index` the Raft index that it reflects,
//! or, after a write, that it was written at.
//!
//! Changes in a stream carry an id ([`Position`]), and now and then comes an id without an event. With the last id as
//! `Last-Event-ID` or `?since=`, a stream resumes behind it, at any host: changes, in order and each once, with a
//! `current` where it has caught up. Hosts keep some thousands of changes; what can no longer be told in full is answered
//! with 410 (`gone`): begin anew, without an id.

mod ca;
mod reads;
mod recovery;

use serde::{Deserialize, Serialize};

use crate::Meta;
pub use crate::discovery::ca::{
    CaStatus, ClusterCa, Held, LateRequest, Loaded, Retired, Root, RootStatus, Rotation, RotationStatus,
    Stage, Wait,
};
pub use crate::discovery::reads::{Consistency, INDEX_HEADER, Position};
pub use crate::discovery::recovery::{
    MAX_SNAPSHOT, OtherMember, RecoverRequest, RecoveryPlan, RejoinRequest, RestorePlan,
};
pub use crate::virtual_address::{VirtualAddresses, VirtualNetworks};

/// The port of discoverd.
pub const PORT: u16 = 1111;

/// Seconds after its last heartbeat until an instance is gone.
pub const TTL_SECS: u64 = 10;

/// Seconds between heartbeats.
pub const HEARTBEAT_SECS: u64 = 3;

/// How a service finds its leader.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LeaderType {
    /// The instance that registered first.
    #[default]
    Oldest,
    /// Whoever is set.
    Manual,
}

/// A service's settings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceConfig {
    /// How it finds its leader.
    #[serde(default)]
    pub leader_type: LeaderType,
}

/// What there is to say about a service as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceInfo {
    /// Its settings.
    #[serde(flatten)]
    pub config: ServiceConfig,
    /// Where its instances and its leader are always found: `vip.<svc>.discoverd`, `vip.leader.<svc>.discoverd`.
    #[serde(default, rename = "virtual")]
    pub addresses: Option<VirtualAddresses>,
}

/// One member of a service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// Derived from protocol and address ([`Instance::id_of`]).
    pub id: String,
    /// `address:port`.
    pub addr: String,
    /// `tcp`, `udp`, `http`, `https`.
    pub proto: String,
    /// Labels: `FLYNN_APP_ID`, `FLYNN_APP_NAME`, `FLYNN_RELEASE_ID`, `FLYNN_PROCESS_TYPE`, `FLYNN_JOB_ID`, `FLYNN_HOST_ID`.
    #[serde(default, skip_serializing_if = "Meta::is_empty")]
    pub meta: Meta,
    /// The Raft index of its first registration: its age, and the fencing token of a leader.
    #[serde(default)]
    pub index: u64,
}

impl Instance {
    /// An instance at `addr` with the id that goes with it.
    pub fn new(proto: &str, addr: impl Into<String>, meta: Meta) -> Self {
        let addr = addr.into();
        Self {
            id: Self::id_of(proto, &addr),
            addr,
            proto: proto.into(),
            meta,
            index: 0,
        }
    }

    /// The id of an instance: 32 hex digits that depend on nothing but protocol and address.
    pub fn id_of(proto: &str, addr: &str) -> String {
        let digest = crate::Digest::of(format!("{proto}-{addr}").as_bytes()).to_string();
        digest[..32].to_owned()
    }
}

/// Metadata of a service, changed by compare-and-swap.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ServiceMeta {
    /// Any JSON.
    pub data: serde_json::Value,
    /// In a write, the index that is replaced (0 to create); in an answer, the present one.
    #[serde(default)]
    pub index: u64,
    /// In a write, the instance that leads from now on (only for `manual` services), set in the same step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader_id: Option<String>,
}

/// Kinds of [`Event`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// An instance is there.
    Up,
    /// An instance's labels changed.
    Update,
    /// An instance is gone.
    Down,
    /// The leader changed; `instance` is absent when there is none.
    Leader,
    /// All that was there when the stream began has been sent.
    Current,
    /// The metadata changed.
    ServiceMeta,
    /// The service is there; with its `virtual` addresses. Only where all services are watched, as its first event.
    Service,
    /// The service is there no more. Only where all services are watched.
    ServiceGone,
    /// Of a newer version.
    #[serde(other)]
    Other,
}

/// A change of a service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// The service.
    pub service: String,
    /// What happened.
    pub kind: EventKind,
    /// The instance that it happened to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<Instance>,
    /// The metadata, for `service_meta`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_meta: Option<ServiceMeta>,
    /// The virtual addresses, for `service`.
    #[serde(default, rename = "virtual", skip_serializing_if = "Option::is_none")]
    pub addresses: Option<VirtualAddresses>,
    /// For `down`: its heartbeats stopped, it did not say goodbye.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub expired: bool,
    /// The Raft index of the change.
    #[serde(default)]
    pub index: u64,
}

impl Event {
    /// An event with nothing but its kind.
    pub fn new(service: impl Into<String>, kind: EventKind, index: u64) -> Self {
        Self {
            service: service.into(),
            kind,
            instance: None,
            service_meta: None,
            addresses: None,
            expired: false,
            index,
        }
    }
}

/// A member of the Raft cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its Raft id.
    pub id: u64,
    /// `address:1111`.
    pub addr: String,
    /// Whether it votes.
    pub voter: bool,
    /// Whether it leads.
    pub leader: bool,
}

/// What an operator wants of a member.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Voting {
    /// The cluster decides whether it votes.
    #[default]
    Auto,
    /// It is to vote rather than others.
    Promoted,
    /// It is not to vote.
    Demoted,
}

/// How a member does, as the leader sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberStatus {
    /// Who it is.
    #[serde(flatten)]
    pub peer: Peer,
    /// Its host's id.
    pub host: String,
    /// Its host's tag `zone`; empty without one.
    pub zone: String,
    /// What the operator wants of it.
    pub vote: Voting,
    /// The Raft index that it has come to; `None` when no leader knows.
    pub index: Option<u64>,
    /// Entries of the log that it lacks.
    pub lag: Option<u64>,
    /// Milliseconds since its last sign of life.
    pub silent_ms: Option<u64>,
}

/// How this discoverd itself does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnStatus {
    /// Its Raft id.
    pub id: u64,
    /// `leader`, `candidate`, `follower` or `learner`.
    pub state: String,
    /// The Raft term.
    pub term: u64,
    /// Where the leader is. Nobody is, too, if this member leads and no majority has answered it of late.
    pub leader: Option<String>,
    /// The last entry of its log.
    pub last_log: u64,
    /// The Raft term of that entry.
    #[serde(default)]
    pub last_term: u64,
    /// The last entry of which it knows that a majority has it.
    pub committed: u64,
    /// The last entry that its state reflects.
    pub applied: u64,
    /// The last entry in its snapshot.
    pub snapshot: u64,
    /// Bytes of its journal.
    pub journal_bytes: u64,
    /// Writes wait for room on its disk.
    pub disk_full: bool,
    /// Why the last recovery, restoration or change of clusters was not made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused_order: Option<String>,
}

/// Services by which the platform's own apps find each other: no other container may register there.
pub const PLATFORM_SERVICES: [&str; 8] = [
    "blobstore",
    "controller",
    "discoverd",
    "postgres",
    "router-api",
    "router-http",
    "scheduler",
    "tarreceive",
];

/// The service whose instances are the hosts, and whose metadata holds the [`NetworkLeases`].
pub const HOST_SERVICE: &str = "flynn-host";

/// The service whose metadata holds the cluster CA ([`ClusterCa`]), and whose instances say what hosts hold ([`Held`]).
pub const CA_SERVICE: &str = "flynn-ca";

/// Metadata of [`HOST_SERVICE`]: the cluster's networks, and which host holds which subnet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkLeases {
    /// The cluster's network.
    pub network: String,
    /// The prefix length of each host's part of it.
    #[serde(default = "NetworkLeases::default_subnet_length")]
    pub subnet_length: u8,
    /// The IPv6 network beside it.
    #[serde(default = "NetworkLeases::default_network6")]
    pub network6: String,
    /// Hosts that share a link with one another reach each other's containers without encapsulation.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub direct: bool,
    /// By host id.
    pub leases: std::collections::BTreeMap<String, SubnetLease>,
}

impl NetworkLeases {
    /// Where the operator has not chosen another: /24.
    pub const DEFAULT_SUBNET_LENGTH: u8 = 24;
    /// Where the operator has not chosen another.
    pub const DEFAULT_NETWORK6: &str = "fd66:6c79:6e6e::/64";

    fn default_subnet_length() -> u8 {
        Self::DEFAULT_SUBNET_LENGTH
    }

    /// [`Self::DEFAULT_NETWORK6`].
    pub fn default_network6() -> String {
        Self::DEFAULT_NETWORK6.into()
    }
}

impl Default for NetworkLeases {
    fn default() -> Self {
        Self {
            network: String::new(),
            subnet_length: Self::DEFAULT_SUBNET_LENGTH,
            network6: Self::default_network6(),
            direct: false,
            leases: std::collections::BTreeMap::new(),
        }
    }
}

/// One host's subnet. It does not run out: a host that comes back finds it. It ends when the host is removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubnetLease {
    /// `100.100.1.0/24`; its first address is the gateway.
    pub subnet: String,
    /// Where the host is reached.
    pub address: std::net::Ipv4Addr,
    /// When the host took it, or said last that it has it: at each start, and once a day.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renewed_at: Option<jiff::Timestamp>,
}

/// The service whose metadata holds the cluster's [`FloatingAddresses`].
pub const FLOATING_SERVICE: &str = "flynn-floating";

/// Metadata of [`FLOATING_SERVICE`]. Only `host:` certificates and discoverd itself may read it.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FloatingAddresses {
    /// `192.0.2.10/24`: held by one host at a time.
    #[serde(default)]
    pub addresses: std::collections::BTreeSet<String>,
    /// What hosts authenticate their heartbeats with: 32 bytes, in base64.
    #[serde(default)]
    pub key: String,
}

impl std::fmt::Debug for FloatingAddresses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FloatingAddresses")
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

/// Asks for a token that lets one host join (`POST /cluster/tokens`, `host:` certificates only).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinToken {
    /// `<secret>.<digest of the CA certificate's DER>`. Good for one use within the hour.
    pub token: String,
}

/// Joins a host (`POST /cluster/join`; the one call of the cluster port that needs no client certificate).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// The token's secret half.
    pub secret: String,
    /// The new host's id.
    pub host_id: String,
    /// The new host's address.
    pub address: std::net::Ipv4Addr,
    /// A certificate signing request, PEM.
    pub csr: String,
}

/// The answer to a [`JoinRequest`], and to a renewal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedIdentity {
    /// The cluster CA's certificate(s), PEM.
    pub ca: String,
    /// The signed certificate, PEM.
    pub cert: String,
    /// Raft peers to start from: `address:1111`.
    #[serde(default)]
    pub peers: Vec<String>,
}

/// Asks for a new certificate of the identity that the caller shows, or, from a host, for one of a system app's jobs
/// (`POST /cluster/renew`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RenewRequest {
    /// A certificate signing request, PEM.
    pub csr: String,
    /// The system app, when a host asks for its jobs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<String>,
}

/// How a discoverd is (`GET /.well-known/status`; 503 while it knows no leader).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// `healthy` or `unhealthy`.
    pub status: String,
    /// Where the Raft leader is.
    pub leader: Option<String>,
    /// The Raft index that it has come to.
    pub index: u64,
}

//! What is written to the Raft log, and what comes of it.
//!
//! Commands are stored on disk and sent between hosts of different versions: a field or a variant may be added (with a
//! default), never changed or taken away.

use std::fmt;
use std::sync::Arc;

use flynn_api::Error;
use flynn_api::discovery::{Instance, LeaderType, ServiceMeta, VirtualNetworks};
use serde::{Deserialize, Serialize};

use crate::weight;

/// A change of the registry.
///
/// A command carries everything that its outcome depends on besides the state: the time, where something expires, is
/// the proposing leader's.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Command {
    /// Makes a service.
    CreateService {
        /// Its name.
        service: String,
        /// How it finds its leader.
        leader_type: LeaderType,
    },
    /// Removes a service with all that belongs to it.
    DeleteService {
        /// Its name.
        service: String,
    },
    /// Registers an instance, or replaces its labels.
    PutInstance {
        /// Its service.
        service: String,
        /// The instance; its index is ignored. Shared: each entry of the log is cloned for each member that gets it.
        instance: Arc<Instance>,
        /// The Raft id of the member that it registered at; 0: of an earlier release, which did not say.
        #[serde(default)]
        member: u64,
    },
    /// Deregisters an instance.
    DeleteInstance {
        /// Its service.
        service: String,
        /// Its id.
        id: String,
    },
    /// Takes out instances whose heartbeats stopped.
    Expire {
        /// Those instances. One that has registered anew since (its index differs) stays.
        instances: Vec<Registration>,
    },
    /// Replaces a service's metadata if it is at `meta.index`.
    SetMeta {
        /// The service.
        service: String,
        /// The new metadata; may name a new leader.
        meta: ServiceMeta,
        /// Names the write: the same one, repeated since its answer was lost, is done once. 0: it has no name.
        #[serde(default)]
        request: u64,
    },
    /// Sets the leader of a `manual` service.
    SetLeader {
        /// The service.
        service: String,
        /// The instance's id.
        id: String,
    },
    /// Sets the networks that virtual addresses are from, once.
    SetVirtualNetworks {
        /// Those.
        networks: VirtualNetworks,
    },
    /// Says what numbers services have: all of them, those that were made by an earlier release included.
    NumberServices {
        /// By service.
        numbers: std::collections::BTreeMap<String, u32>,
        /// The number that was given last.
        last: u32,
    },
    /// Keeps a join token.
    AddToken {
        /// Digest of the secret.
        digest: String,
        /// When it was made, in milliseconds since 1970.
        now: u64,
        /// When it ends, likewise.
        expires: u64,
    },
    /// Uses up a join token. The same request may use it again, in case the answer was lost.
    UseToken {
        /// Digest of the secret.
        digest: String,
        /// Digest of the request.
        request: String,
        /// The time, in milliseconds since 1970.
        now: u64,
    },
}

impl Command {
    /// Whether applying it twice is the same as applying it once, also to whoever is told of the outcome (unless it is
    /// refused the second time, and not [`Error::surely_undone`]).
    pub fn may_repeat(&self) -> bool {
        matches!(
            self,
            Self::SetMeta { request: 1.., .. }
                | Self::PutInstance { .. }
                | Self::Expire { .. }
                | Self::SetLeader { .. }
                | Self::SetVirtualNetworks { .. }
                | Self::NumberServices { .. }
                | Self::AddToken { .. }
                | Self::UseToken { .. }
        )
    }

    /// About how many bytes it takes.
    pub fn weight(&self) -> usize {
        const FIXED: usize = 200;
        FIXED
            + match self {
                Self::PutInstance { instance, .. } => weight::instance(instance),
                Self::SetMeta { meta, .. } => weight::json(&meta.data),
                Self::Expire { instances } => instances.len() * FIXED,
                Self::NumberServices { numbers, .. } => numbers.len() * FIXED,
                Self::CreateService { .. }
                | Self::DeleteService { .. }
                | Self::DeleteInstance { .. }
                | Self::SetLeader { .. }
                | Self::SetVirtualNetworks { .. }
                | Self::AddToken { .. }
                | Self::UseToken { .. } => 0,
            }
    }
}

/// Names one registration of one instance.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Registration {
    /// The service.
    pub service: String,
    /// The instance.
    pub id: String,
    /// When it registered.
    pub index: u64,
}

/// What came of a command.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It was done.
    Done {
        /// The Raft index of the command.
        index: u64,
    },
    /// A rule forbids it; nothing was changed.
    Refused(Error),
}

/// Names what is done to whom, never the content: openraft logs commands, and metadata holds secrets.
impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CreateService { service, .. } => write!(f, "create service {service}"),
            Self::DeleteService { service } => write!(f, "delete service {service}"),
            Self::PutInstance {
                service, instance, ..
            } => write!(f, "put instance {} of {service}", instance.id),
            Self::DeleteInstance { service, id } => write!(f, "delete instance {id} of {service}"),
            Self::Expire { instances } => write!(f, "expire {} instances", instances.len()),
            Self::SetMeta { service, meta, .. } => write!(f, "set metadata of {service} at {}", meta.index),
            Self::SetLeader { service, id } => write!(f, "set leader of {service} to {id}"),
            Self::SetVirtualNetworks { networks } => {
                write!(
                    f,
                    "set virtual networks to {} and {}",
                    networks.ipv4, networks.ipv6
                )
            }
            Self::NumberServices { numbers, .. } => write!(f, "number {} services", numbers.len()),
            Self::AddToken { .. } => f.write_str("add token"),
            Self::UseToken { .. } => f.write_str("use token"),
        }
    }
}

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

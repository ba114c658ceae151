//! What keeps a peer from being of use, in words for people.

use crate::STATE_VERSION;

/// Why a peer waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Discoverd has not been heard yet.
    #[error("discoverd has not answered yet; the database starts when it does")]
    Unknown,
    /// No cluster yet, and this peer is not the one to begin it.
    #[error(
        "there is no cluster yet, and an older peer is there to begin it; it does so when its discoverd answers"
    )]
    NotOldest,
    /// A database without a state.
    #[error(
        "the data volume holds a database, but discoverd holds no state of its cluster; \
         restore discoverd's metadata of this service, or start with an empty volume"
    )]
    StateLost,
    /// Another peer is the singleton.
    #[error("this cluster is a singleton and another peer is its primary; scale the process type to 1")]
    Singleton,
    /// Lost its lead.
    #[error("this peer was deposed and may hold what the others do not; remove its volume to rebuild it")]
    Deposed,
    /// A cluster with replication.
    #[error(
        "the cluster's state is a replicated one, and this release runs singletons only; use a newer release"
    )]
    Replicated,
    /// A state from a newer release.
    #[error(
        "the cluster's state has version {0}, and this release knows up to {STATE_VERSION}; use a newer release"
    )]
    Version(u32),
}

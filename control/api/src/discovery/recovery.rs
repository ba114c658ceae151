//! The operator's last resorts: what it would mean to use them, and what is said when one is.

use serde::{Deserialize, Serialize};

use super::Peer;

/// The longest snapshot of the registry that is given and taken.
pub const MAX_SNAPSHOT: usize = 1 << 30;

/// What it would mean to let this member go on alone (`GET /cluster/recovery`), or means (`POST /cluster/recover`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryPlan {
    /// This member's Raft id. It gets another one.
    pub id: u64,
    /// A majority of the voters answers: there is nothing to recover.
    pub majority: bool,
    /// The last entry of this member's log: the recovered registry holds all up to there.
    pub last_log: u64,
    /// Its Raft term.
    pub last_term: u64,
    /// The last entry of which this member knows that a majority had it. What came later may never have been answered.
    pub committed: u64,
    /// The other members, as far as they are known here.
    pub others: Vec<OtherMember>,
    /// Why it should not be done, which `force` overrules. Of a majority it does not.
    pub objections: Vec<String>,
}

/// Another member, as one that is to go on alone sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OtherMember {
    /// Who it is.
    #[serde(flatten)]
    pub peer: Peer,
    /// Its host's id.
    pub host: String,
    /// Whether it answers.
    pub answers: bool,
    /// The last entry of its log: its Raft term and its index.
    pub last: Option<(u64, u64)>,
}

/// What it would mean to put a snapshot in place of this member's registry (`POST /cluster/restore?check=true`), or
/// means (`POST /cluster/restore`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestorePlan {
    /// This member's Raft id. It gets another one.
    pub id: u64,
    /// The Raft index that the snapshot reflects.
    pub index: u64,
    /// Its services.
    pub services: usize,
    /// Services that are here and not in the snapshot: they are lost.
    pub lost: Vec<String>,
    /// Services whose metadata or settings the snapshot has otherwise: what is here is lost.
    pub changed: Vec<String>,
    /// Why it should not be done, which `force` overrules.
    pub objections: Vec<String>,
}

/// Asks a member to leave its cluster and to join that of others (`POST /cluster/rejoin`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejoinRequest {
    /// Members of the cluster that it is to join: `address:1111`.
    pub members: Vec<String>,
    /// Also when a majority of its own cluster answers.
    #[serde(default)]
    pub force: bool,
}

/// How a last resort is used (`POST /cluster/recover`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoverRequest {
    /// In spite of objections.
    #[serde(default)]
    pub force: bool,
}

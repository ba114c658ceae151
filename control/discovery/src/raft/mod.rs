//! Consensus: openraft with our log on disk, our state machine and our network.
//!
//! - [`dir`]: the store's directory and the member's id.
//! - [`journal`]: the file that holds log and vote, written by one thread with one `fdatasync` per batch.
//! - [`log`]: openraft's log storage on it.
//! - [`machine`]: the state machine that keeps [`crate::view::View`] up to date, and [`snapshot`], its file.
//! - [`network`], [`rpc`]: the two ends of the calls between members; [`line`](mod@line): the connections that carry them;
//!   [`pace`]: when a member is told something.

pub mod dir;
pub mod journal;
pub mod line;
pub mod log;
pub mod machine;
pub mod network;
pub mod pace;
pub mod rpc;
pub mod snapshot;

use std::sync::Arc;
use std::time::Duration;

use flynn_api::discovery::{TTL_SECS, Voting};
use openraft::{Config, EntryPayload, RaftTypeConfig, SnapshotPolicy};
use serde::{Deserialize, Serialize};

use crate::command::{Command, Outcome};

openraft::declare_raft_types!(
    /// The types that openraft works with here.
    pub TypeConfig:
        D = Command,
        R = Outcome,
        Node = Member,
);

/// openraft's types as they are here, on whatever runtime: log and state machine work on tokio's as on a simulated one.
pub trait Types:
    RaftTypeConfig<
        D = Command,
        R = Outcome,
        NodeId = u64,
        Node = Member,
        Term = u64,
        LeaderId = <TypeConfig as RaftTypeConfig>::LeaderId,
        Vote = Vote,
        Payload = EntryPayload<Command, u64, Member>,
        Entry = Entry,
    >
{
}

impl Types for TypeConfig {}

/// openraft's handle.
pub type Raft = openraft::Raft<TypeConfig, machine::Machine>;
/// A log entry.
pub type Entry = openraft::type_config::alias::EntryOf<TypeConfig>;
/// The id of a log entry.
pub type LogId = openraft::type_config::alias::LogIdOf<TypeConfig>;
/// A vote.
pub type Vote = openraft::type_config::alias::VoteOf<TypeConfig>;
/// What a snapshot holds beside its data.
pub type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<TypeConfig>;
/// A snapshot: the state as JSON.
pub type Snapshot = openraft::type_config::alias::SnapshotOf<TypeConfig, Vec<u8>>;
/// Who the members are.
pub type StoredMembership = openraft::type_config::alias::StoredMembershipOf<TypeConfig>;

/// What members know of each other. They are told apart by their Raft ids: addresses may change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Where its cluster listener is: `address:1111`.
    pub addr: String,
    /// The host it runs on.
    #[serde(default)]
    pub host: String,
    /// The host's tag `zone`: what fails together; empty without one.
    #[serde(default)]
    pub zone: String,
    /// What the operator wants of it.
    #[serde(default)]
    pub vote: Voting,
}

/// Times and sizes that members keep to.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Between a leader's heartbeats.
    pub heartbeat: Duration,
    /// The least of the random time after which a member calls an election. The most is 1.6 times as much; and so is the
    /// lease that a heartbeat gives the leader, which has to run out before that time begins.
    pub election: Duration,
    /// Log entries after which a snapshot is made.
    pub snapshot_after: u64,
    /// An instance without a heartbeat for this long is gone.
    pub lease: Duration,
    /// Between the beats by which a member says that it lives, and who with it.
    pub beat: Duration,
    /// A member without a beat for this long is gone, if its host does not answer either.
    pub silence: Duration,
    /// A voter without a sign of life for this long is replaced, if a learner is well.
    pub replace: Duration,
    /// A learner that is well for this long may become a voter.
    pub settle: Duration,
    /// A step of a change of the CA's roots is let sink in for this long.
    pub ca_settle: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            // Three of them in a lease. Each goes to every member: with a hundred of them it is most of what a leader does.
            heartbeat: Duration::from_millis(130),
            // Writes go on within a second of a leader's death: a lease of 400 ms, then 250 to 400 ms. Two that call
            // at once do not stand in each other's way: the greater id wins.
            election: Duration::from_millis(250),
            snapshot_after: 5_000,
            lease: Duration::from_secs(TTL_SECS),
            beat: Duration::from_millis(300),
            silence: Duration::from_millis(1400),
            replace: Duration::from_mins(1),
            settle: Duration::from_secs(2),
            ca_settle: crate::ca::SETTLE,
        }
    }
}

/// Log entries that stay behind a snapshot, for members that are late: when all hosts register all that they have, as after
/// a power cut, those at the end of the line are thousands behind, and snapshots for them would make them later still.
const KEPT_LOGS: u64 = 2_500;

impl Timing {
    /// openraft's settings.
    pub fn config(self) -> Result<Arc<Config>, openraft::ConfigError> {
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let config = Config {
            cluster_name: "flynn".to_owned(),
            heartbeat_interval: millis(self.heartbeat),
            election_timeout_min: millis(self.election),
            election_timeout_max: millis(self.election * 8 / 5),
            install_snapshot_timeout: 30_000,
            max_payload_entries: 1024,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(self.snapshot_after),
            max_in_snapshot_log_to_keep: KEPT_LOGS.min(self.snapshot_after),
            purge_batch_size: 256.min(self.snapshot_after),
            enable_pre_vote: Some(true),
            // A leader that begins anew may have lost the end of its log, which others hold committed; in its old term it
            // would write other entries to the same places, and answer reads without those that it does not know.
            enable_leader_restore: Some(false),
            ..Config::default()
        };
        Ok(Arc::new(config.validate()?))
    }
}

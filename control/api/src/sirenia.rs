//! The replicated appliances: the state of a database cluster, kept in its service's metadata in discoverd and changed by
//! compare-and-swap, and what each of its processes tells about itself.
//!
//! The metadata of service `postgres` is a [`State`]; the service's leader is set to the primary in the same write.
//! Each process serves, one port above its database's:
//!
//! | call | what |
//! | --- | --- |
//! | `GET /status` | [`Status`] |
//! | `GET /.well-known/status` | is the database of use |
//! | `POST /stop` | stops the database for good: the process ends when it is down |

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::discovery::Instance;

/// The version of [`State`] that this release writes.
pub const STATE_VERSION: u32 = 1;

/// Who is what in a database cluster.
///
/// A new generation begins when primary or sync changes; `init_wal` is the primary's position at its beginning.
/// Peers are instances of the service, told apart by their identity label, not by their address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// [`STATE_VERSION`].
    #[serde(default = "first_version")]
    pub version: u32,
    /// Grows by one with each change of primary or sync.
    pub generation: u64,
    /// Set while nothing may change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze: Option<Freeze>,
    /// One peer alone, without replication.
    #[serde(default)]
    pub singleton: bool,
    /// The primary's position in its log when the generation began, in the engine's own notation.
    #[serde(default)]
    pub init_wal: String,
    /// Takes writes.
    pub primary: Instance,
    /// Has every commit that the primary has acknowledged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sync: Option<Instance>,
    /// Follow in this order: the first from the sync, each other from the one before it.
    #[serde(rename = "async", default, skip_serializing_if = "Vec::is_empty")]
    pub asyncs: Vec<Instance>,
    /// Were primary once and may have what nobody else has; to be rebuilt.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deposed: Vec<Instance>,
}

fn first_version() -> u32 {
    1
}

/// Since when nothing may change, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freeze {
    /// Since when.
    pub at: Timestamp,
    /// Why, for people.
    pub reason: String,
}

/// What a peer is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Not known yet.
    #[default]
    None,
    /// Takes writes.
    Primary,
    /// Has every acknowledged commit.
    Sync,
    /// Follows.
    Async,
    /// Has no part in the cluster.
    Unassigned,
    /// Lost its lead; its database is stopped until it is rebuilt.
    Deposed,
}

/// What a database process tells about itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Its place in the cluster.
    pub peer: PeerStatus,
    /// Its database.
    pub database: DatabaseStatus,
}

/// A peer's place in the cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its identity, which outlives its address.
    pub id: String,
    /// What it is.
    pub role: Role,
    /// The state as it knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<State>,
    /// What it waits for or cannot get over: what, why, what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// The database of a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatabaseStatus {
    /// Its server runs.
    pub running: bool,
    /// The administrative user and its database are there.
    pub user_exists: bool,
    /// It takes writes.
    pub read_write: bool,
    /// Its position in its log.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub xlog: String,
    /// Why it does not run, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Meta;

    #[test]
    fn a_state_keeps_its_names_on_the_wire() {
        let peer = Instance::new("tcp", "100.100.1.2:5432", Meta::new());
        let state = State {
            version: STATE_VERSION,
            generation: 1,
            freeze: None,
            singleton: true,
            init_wal: "0/0".into(),
            primary: peer.clone(),
            sync: None,
            asyncs: vec![peer],
            deposed: Vec::new(),
        };
        let json = serde_json::to_value(&state).unwrap();
        assert_eq!(json["async"][0]["addr"], "100.100.1.2:5432");
        assert_eq!(serde_json::from_value::<State>(json).unwrap(), state);
        assert_eq!(serde_json::to_value(Role::Unassigned).unwrap(), "unassigned");
    }
}

//! What a member's directory adds up to: its snapshot and all of its log, whether known to be committed or not.
//!
//! An entry that was answered is on the disks of a majority, and perhaps only this disk of it is left: whether this
//! member has heard that it is committed says nothing. One that was never answered may be in the log as well; whoever
//! wrote it was told that nobody knows what came of it.

use std::io;
use std::path::Path;

use openraft::EntryPayload;

use crate::raft::log::LogStore;
use crate::raft::machine::decode_state;
use crate::raft::snapshot::SnapshotFile;
use crate::raft::{Entry, LogId, Snapshot, StoredMembership};
use crate::state::State;

/// What it adds up to.
#[derive(Debug, Default, PartialEq)]
pub struct Built {
    /// The registry.
    pub state: State,
    /// The last entry that it reflects.
    pub last: Option<LogId>,
    /// The members.
    pub membership: StoredMembership,
    /// The highest Raft term that is known here.
    pub term: u64,
}

/// Reads the directory of a member that does not run. A torn end of its journal is cut off, as at any start.
pub fn read(dir: &Path) -> io::Result<Built> {
    let snapshot = SnapshotFile::new(dir).read()?;
    let log = LogStore::open(dir)?;
    build(snapshot, log.entries(), log.term())
}

/// Puts them together.
pub fn build(snapshot: Option<Snapshot>, entries: Vec<Entry>, term: u64) -> io::Result<Built> {
    let mut built = Built {
        term,
        ..Built::default()
    };
    if let Some(Snapshot { meta, snapshot }) = snapshot {
        built.state = decode_state(&snapshot)?;
        (built.last, built.membership) = (meta.last_log_id, meta.last_membership);
    }
    for entry in entries {
        let next = built.last.map_or(0, |last| last.index + 1);
        if entry.log_id.index < next {
            continue;
        }
        if entry.log_id.index > next {
            let message = format!(
                "entry {next} is neither in the snapshot nor in the journal, which goes on at {}: they are not of one \
                 member, or one of them is old",
                entry.log_id.index
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        if Some(entry.log_id) < built.last {
            // An earlier leader's, that the snapshot's leader had taken back: this member was killed before it had.
            break;
        }
        match &entry.payload {
            EntryPayload::Normal(command) => {
                let _ = built.state.apply(entry.log_id.index, command);
            }
            EntryPayload::Membership(membership) => {
                built.membership = StoredMembership::new(Some(entry.log_id), membership.clone());
            }
            EntryPayload::Blank => {}
        }
        built.last = Some(entry.log_id);
    }
    built.term = built.term.max(built.last.map_or(0, |last| last.leader_id.term));
    Ok(built)
}

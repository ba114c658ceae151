//! What is in a new store.
//!
//! A store that goes on alone holds a snapshot of the registry with this member as the only one, a journal with a vote of
//! a later Raft term, and, in `former`, the ids that its cluster knew it by. One that joins holds, in `join`, whom; and in
//! `last` what the old store knew, by which this host answers until the other cluster has told it more.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::mpsc;

use anyhow::Context as _;
use flynn_api::discovery::CA_SERVICE;
use openraft::Membership;
use openraft::vote::leader_id_adv::LeaderId;

use super::build::{self, Built};
use super::{JUMP, Order, RESTORING, STORE, write};
use crate::Options;
use crate::raft::journal::{Encoded, Journal, Record};
use crate::raft::machine::{decode_state, encode_state};
use crate::raft::snapshot::{SnapshotFile, decode};
use crate::raft::{LogId, Member, SnapshotMeta, StoredMembership, Vote, dir};
use crate::state::State;

/// Ids that this member had in clusters that it has left behind.
const FORMER: &str = "former";
/// Members of the cluster that it is to join.
const JOIN: &str = "join";
/// What the store knew before it was to join another cluster.
const LAST: &str = "last";

/// Makes the store in `dir`.
pub(super) fn store(options: &Options, order: &Order, id: u64, dir: &Path) -> anyhow::Result<()> {
    let old = options.data.join(STORE);
    std::fs::create_dir_all(dir)?;
    match order {
        Order::Recover => {
            let built = read(&old)?;
            anyhow::ensure!(
                built.last.is_some(),
                "there is nothing to recover: {} holds no registry",
                old.display()
            );
            let state = built.state.clone();
            alone(options, id, dir, &built, state)?;
        }
        Order::Restore => {
            let mut built = read(&old)?;
            let bytes = std::fs::read(options.data.join(RESTORING)).context("the snapshot is gone")?;
            let (meta, mut state) = decode_file(&bytes)?;
            state.adopt(CA_SERVICE, &built.state);
            let (index, term) = meta
                .last_log_id
                .map_or((0, 0), |last| (last.index, last.leader_id.term));
            let own = built.last.map_or(0, |last| last.index);
            built.term = built.term.max(term);
            built.last = Some(LogId::new(
                LeaderId {
                    term: built.term,
                    node_id: id,
                },
                own.max(index),
            ));
            alone(options, id, dir, &built, state)?;
        }
        Order::Join { members } => {
            write(&dir.join(JOIN), &serde_json::to_vec(members)?)?;
            // What cannot be read is no reason to stay.
            match read(&old) {
                Ok(built) if built.last.is_some() => {
                    std::fs::create_dir_all(dir.join(LAST))?;
                    let meta = SnapshotMeta {
                        last_log_id: built.last,
                        last_membership: built.membership,
                    };
                    SnapshotFile::new(&dir.join(LAST)).write(&meta, &encode_state(&built.state)?)?;
                }
                Ok(_) => {}
                Err(error) => tracing::warn!(%error, "what this host knew cannot be read"),
            }
        }
    }
    write(&dir.join("id"), dir::encode_id(id).as_bytes())?;
    Ok(())
}

fn read(old: &Path) -> anyhow::Result<Built> {
    if !old.is_dir() {
        return Ok(Built::default());
    }
    build::read(old).with_context(|| format!("the store {} cannot be read", old.display()))
}

/// The registry in a snapshot file.
pub(super) fn decode_file(bytes: &[u8]) -> anyhow::Result<(SnapshotMeta, State)> {
    let (meta, data) =
        decode::<SnapshotMeta>(bytes).map_err(|why| anyhow::anyhow!("the snapshot cannot be read: {why}"))?;
    let state = decode_state(data).context("the snapshot cannot be read")?;
    Ok((meta, state))
}

/// Snapshot and journal of a cluster of one that goes on after `built`.
fn alone(options: &Options, id: u64, dir: &Path, built: &Built, state: State) -> anyhow::Result<()> {
    let leader = LeaderId {
        term: built.term + 1,
        node_id: id,
    };
    let last = LogId::new(leader, built.last.map_or(0, |last| last.index) + JUMP);
    let old = options.data.join(STORE);
    let old_id = dir::stored_id(&old)?;
    let known = old_id.and_then(|id| built.membership.membership().get_node(&id).cloned());
    let member = Member {
        addr: SocketAddr::from((options.host_ip, options.api_port)).to_string(),
        host: options.host_id.clone(),
        ..known.unwrap_or_default()
    };
    let membership = Membership::new(vec![BTreeSet::from([id])], BTreeMap::from([(id, member)]))?;
    let meta = SnapshotMeta {
        last_log_id: Some(last),
        last_membership: StoredMembership::new(Some(last), membership),
    };
    SnapshotFile::new(dir).write(&meta, &encode_state(&state.begun_anew())?)?;

    let mut records = Encoded::default();
    records.push(&Record::Vote(Vote::new(leader.term, id)))?;
    records.push(&Record::Purge(last))?;
    records.push(&Record::Committed(Some(last)))?;
    let journal = Journal::open(&dir.join("journal"), |_| ())?;
    let (sender, synced) = mpsc::channel();
    journal.append(
        records,
        Some(Box::new(move |result| {
            // The receiver waits for it below.
            let _ = sender.send(result);
        })),
    )?;
    synced.recv().context("the journal has stopped")??;

    let mut ids = former(&old);
    ids.extend(old_id);
    write(&dir.join(FORMER), &serde_json::to_vec(&ids)?)?;
    Ok(())
}

/// The ids that the member in `store` had before.
pub(crate) fn former(store: &Path) -> Vec<u64> {
    read_json(&store.join(FORMER)).unwrap_or_default()
}

/// Whom the member in `store` is to join, whatever else it is told.
pub(crate) fn to_join(store: &Path) -> Option<Vec<String>> {
    read_json(&store.join(JOIN))
}

/// What this host knew before the member in `store` was to join another cluster.
pub(crate) fn last_known(store: &Path) -> Option<State> {
    let last = SnapshotFile::new(&store.join(LAST)).read().ok().flatten()?;
    decode_state(&last.snapshot).ok()
}

/// The other cluster has told it more.
pub(crate) fn forget_last_known(store: &Path) {
    // If it stays it is not looked at.
    let _ = std::fs::remove_dir_all(store.join(LAST));
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    let read = || -> io::Result<T> { Ok(serde_json::from_slice(&std::fs::read(path)?)?) };
    match read() {
        Ok(value) => Some(value),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "it cannot be read");
            None
        }
    }
}
